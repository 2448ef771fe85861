"""What was found in one picture, for people: `Result`, what a call of a `Predictor` returns."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from brefine.outlines import Ring, simple_parts
from brefine.parts.masks import paste_all, to_records
from brefine.rle import Runs, decode
from brefine.sources import as_pixels
from brefine.structures import Bitmaps, Category, InputError, Instances

#: classes that ``repr`` names, and pixels of the long side that a notebook shows
CLASSES, SHOWN = 4, 1280


class Object(NamedTuple):
    """One object of a result.

    Attributes:
        name: of its class.
        score: 0..1.
        box: (x1, y1, x2, y2) in pixels of the picture.
        label: row of the category table.
        mask: ``[h, w]`` bool, in a window around its pixels; ``[0, 0]`` without any.
        origin: (x, y) of the window's top left pixel.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    label: int
    mask: NDArray[np.bool_]
    origin: tuple[int, int]


class Masks(Sequence[NDArray[np.bool_]]):
    """The masks of a result in the whole picture, each drawn when it is asked for.

    ``masks[i]`` is ``[H, W]`` bool; ``np.asarray(masks)`` is all of them, ``[N, H, W]``.
    """

    def __init__(self, runs: Sequence[Runs], size: tuple[int, int]) -> None:
        self.runs, self.shape = runs, (len(runs), *size)

    def __len__(self) -> int:
        return len(self.runs)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.bool_]: ...
    @overload
    def __getitem__(self, index: slice) -> Masks: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.bool_] | Masks:
        if isinstance(index, slice):
            return Masks(self.runs[index], self.shape[1:])
        dense = np.zeros(self.shape[1:], dtype=bool)
        window, (x, y) = self.runs[index].window()
        dense[y : y + window.shape[0], x : x + window.shape[1]] = window.numpy()
        return dense

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        dense = np.zeros(self.shape, dtype=bool)
        for i, mask in enumerate(self):
            dense[i] = mask
        return dense if dtype is None else dense.astype(dtype)

    def __repr__(self) -> str:
        return f"Masks {list(self.shape)}, drawn when asked for"


class Result:
    """What was found in one picture, best score first.

    ``len(result)`` objects; iterating gives an `Object` each, as does ``result[i]``; a slice,
    indices or a condition give a smaller result: ``result[result.scores > 0.8]``. A notebook
    shows the picture with its objects.

    Args:
        instances: boxes, labels and scores in the picture's frame, with mask logits or masks.
        categories: the category table; label ``i`` is row ``i``.
        picture: a file, which is read again when it is needed, or RGB ``[3, H, W]`` uint8; None:
            there is nothing to draw on.
    """

    def __init__(
        self,
        instances: Instances,
        categories: Sequence[Category],
        picture: str | Path | Tensor | None = None,
    ) -> None:
        self.instances, self.categories, self.picture = instances, list(categories), picture

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture."""
        return self.instances.size

    @property
    def boxes(self) -> Tensor:
        """``[N, 4]`` float32, x1, y1, x2, y2 in pixels of the picture, the last two exclusive."""
        return self.instances.boxes

    @property
    def labels(self) -> Tensor:
        """``[N]`` int64, rows of the category table."""
        return self.instances.labels

    @property
    def scores(self) -> Tensor:
        """``[N]``, 0..1."""
        scores = self.instances.scores
        return torch.ones(len(self)) if scores is None else scores

    @property
    def names(self) -> list[str]:
        """The name of each object's class."""
        return [self.categories[label].name for label in self.labels.tolist()]

    @cached_property
    def runs(self) -> list[Runs]:
        """The masks as runs of pixels: small, whatever the picture's size."""
        return paste_all(self.instances, self.size)

    @property
    def masks(self) -> Masks:
        """The masks in the whole picture, drawn one by one when they are asked for."""
        return Masks(self.runs, self.size)

    def mask(self, index: int) -> tuple[NDArray[np.bool_], tuple[int, int]]:
        """One mask in a window around its pixels.

        Returns:
            ``[h, w]`` bool and the (x, y) of its top left pixel; ``[0, 0]`` without a pixel.
        """
        window, origin = self.runs[index].window()
        return window.numpy().astype(bool), origin

    def polygons(self, tolerance: float = 0.0) -> list[list[list[Ring]]]:
        """The outlines of each object: its parts, each an outline and its holes.

        Args:
            tolerance: pixels by which an outline may leave the edges of the pixels, to have
                fewer corners; with 0 the outlines are the masks.

        Returns:
            Rings are ``[n, 2]`` corners (x, y) in pixels of the picture, not closed.
        """
        found = []
        for index in range(len(self)):
            window, origin = self.mask(index)
            found.append(simple_parts(window, origin, tolerance))
        return found

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """COCO results: see ``parts.masks.to_records``."""
        return to_records(self.instances, image_id, self.categories, self.size)

    def to_supervision(self) -> Any:
        """As ``supervision.Detections``, with dense masks and ``class_name``.

        Raises:
            InputError: supervision is not installed.
        """
        try:
            from supervision import Detections
        except ImportError:
            raise InputError(
                "to_supervision needs supervision: pip install 'brefine[supervision]'"
            ) from None
        return Detections(
            xyxy=self.boxes.numpy().reshape(-1, 4),
            mask=np.asarray(self.masks),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, *, names: bool = True, fill: float = 0.5) -> Image.Image:
        """The picture with its objects: see ``draw.overlay``.

        Raises:
            InputError: there is no picture, or its file has changed.
        """
        from brefine.draw import overlay  # brings evaluation along: too much for one picture

        if self.picture is None:
            raise InputError("this result has no picture to draw on: use draw.overlay with one")
        pixels = as_pixels(self.picture)
        if (size := tuple(pixels.shape[1:])) != self.size:
            raise InputError(
                f"{self.picture}: {size[0]} x {size[1]} pixels, but {self.size[0]} x "
                f"{self.size[1]} when it was predicted"
            )
        return overlay(pixels, self.to_coco(0), self.categories, names=names, fill=fill)

    def __len__(self) -> int:
        return len(self.instances)

    def __iter__(self) -> Iterator[Object]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Object: ...
    @overload
    def __getitem__(self, index: slice | Sequence[Any] | Tensor | NDArray[Any]) -> Result: ...
    def __getitem__(self, index: Any) -> Object | Result:
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"object {index} of {len(self)}")
            x1, y1, x2, y2 = self.boxes[index].tolist()
            label = int(self.labels[index])
            name, score = self.categories[label].name, float(self.scores[index])
            return Object(name, score, (x1, y1, x2, y2), label, *self.mask(int(index)))
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        chosen = torch.as_tensor(np.asarray(index))
        whole = not chosen.is_floating_point() and chosen.dtype != torch.bool
        if whole and not chosen.ndim:
            return self[int(chosen)]
        if chosen.ndim != 1:
            raise IndexError("expected a number, a slice, or a list of numbers or of yes and no")
        if whole or (not chosen.numel() and chosen.dtype != torch.bool):
            chosen = chosen.long()  # bytes would be a mask
        fewer = Result(self.instances[chosen], self.categories, self.picture)
        if "runs" in vars(self):  # what has been pasted is not pasted again
            rows = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
            fewer.runs = [self.runs[row] for row in rows.tolist()]
        return fewer

    def __repr__(self) -> str:
        height, width = self.size
        text = f"Result {height} x {width}: "
        if not len(self):
            return f"{text}no objects"
        scores: dict[str, list[float]] = {}
        for name, score in zip(self.names, self.scores.tolist(), strict=True):
            scores.setdefault(name, []).append(score)
        parts = []
        ranked = sorted(scores.items(), key=lambda item: -len(item[1]))
        for name, each in ranked[:CLASSES]:
            span = f"{max(each):.2f}" + (f" to {min(each):.2f}" if len(each) > 1 else "")
            parts.append(f"{len(each)} {name} ({span})")
        if rest := ranked[CLASSES:]:
            parts.append(f"{sum(len(each) for _, each in rest)} of {len(rest)} more classes")
        return text + ", ".join(parts)

    def _repr_png_(self) -> bytes | None:
        if self.picture is None:
            return None
        image = self.draw()
        image.thumbnail((SHOWN, SHOWN))
        content = io.BytesIO()
        image.save(content, "PNG")
        return content.getvalue()


def of_records(
    records: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    categories: Sequence[Category],
) -> Instances:
    """The objects of one picture from its COCO results, with masks in the picture's frame.

    Raises:
        ValueError: a mask is not right, or not of the picture's size.
        KeyError: a category that is not in the table.
    """
    labels = {category.id: label for label, category in enumerate(categories)}
    boxes = torch.tensor([record["bbox"] for record in records], dtype=torch.float64).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    windows = [decode(record["segmentation"], size).window() for record in records]
    origins = torch.tensor([origin for _, origin in windows], dtype=torch.int64).view(-1, 2)
    return Instances(
        size,
        boxes.float(),
        torch.tensor([labels[record["category_id"]] for record in records], dtype=torch.int64),
        torch.tensor([record["score"] for record in records], dtype=torch.float64),
        Bitmaps([window for window, _ in windows], origins),
    )
