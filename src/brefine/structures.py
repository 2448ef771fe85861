"""What passes between the parts, and every convention, stated once.

Conventions:
    * Pictures are RGB, ``[3, H, W]``, values 0..255 (uint8 or float). Models normalise inside.
    * Coordinates are continuous: pixel ``k`` covers ``[k, k + 1)`` and its centre is ``k + 0.5``.
    * Boxes are xyxy float32 in pixels of the frame they travel with; x2 and y2 are exclusive
      (last pixel + 1), so width is ``x2 - x1``.
    * Labels are 0..K-1, in the order of the category table; there is no background label. The
      table keeps a data set's own category ids and travels with the weights.
    * Sizes are (height, width).
    * RoI masks are logits on a grid that spans the box exactly: cell ``k`` of S has its centre
      at ``(k + 0.5) / S`` of the box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:  # imported where tensors are made: exported models are read without torch
    import torch
    from torch import Tensor


class InputError(ValueError):
    """The user's input is wrong: the message is one line that says what, where and what to do.

    The command line prints the message and exits with code 2; no traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Stopped(Exception):
    """A signal ended a run after it was saved; the message says how to go on.

    The command line prints the message and exits with code 75.
    """


def printable(text: str) -> str:
    """Half a surrogate pair, legal in json and in names of files, cannot be printed: ``?``."""
    return text.encode("utf-8", "replace").decode()


class Category(NamedTuple):
    """One row of the category table: label ``i`` of a model is row ``i``."""

    id: int  #: the data set's own category id
    name: str


@dataclass(frozen=True)
class Images:
    """A batch of pictures, padded at the right and the bottom.

    Attributes:
        pixels: ``[B, 3, H, W]``, uint8 or float, RGB, 0..255, zeros in the padding.
        sizes: ``[B, 2]`` int64, (height, width) of each picture inside the padding.
    """

    pixels: Tensor
    sizes: Tensor

    @classmethod
    def stack(cls, pictures: Sequence[Tensor], multiple: int = 32) -> Images:
        """Pad pictures ``[3, h, w]`` to one size, a multiple of ``multiple``, and stack them.

        Raises:
            InputError: there is no picture, or one is not ``[3, h, w]`` with h, w >= 1.
        """
        if not pictures:
            raise InputError("no pictures to stack: give at least one [3, H, W] tensor")
        for index, picture in enumerate(pictures):
            if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
                shape = tuple(picture.shape)
                raise InputError(f"picture {index} has shape {shape}, expected [3, H, W] (RGB)")
        height = max(picture.shape[1] for picture in pictures)
        width = max(picture.shape[2] for picture in pictures)
        height, width = (-(-side // multiple) * multiple for side in (height, width))
        pixels = pictures[0].new_zeros(len(pictures), 3, height, width)
        for slot, picture in zip(pixels, pictures, strict=True):
            slot[:, : picture.shape[1], : picture.shape[2]] = picture
        import torch

        sizes = torch.tensor([picture.shape[1:] for picture in pictures], device=pixels.device)
        return cls(pixels, sizes)

    def to(self, device: torch.device | str) -> Images:
        """The same batch on ``device``."""
        return Images(self.pixels.to(device), self.sizes.to(device))

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Bitmaps:
    """Binary masks of N objects, each kept only inside a window of the frame.

    A dense ``[N, H, W]`` array is never needed: 300 objects at 800 x 1333 would take 320 MB.

    Attributes:
        windows: N uint8 tensors ``[h_i, w_i]`` of 0 and 1; ``h_i`` or ``w_i`` may be 0.
        origins: ``[N, 2]`` int64, (x, y) of each window's top left pixel in the frame.
    """

    windows: list[Tensor]
    origins: Tensor

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Tensor) -> Bitmaps:
        """The objects at ``index`` (int64 ``[M]`` or bool ``[N]``), in that order."""
        import torch

        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        return Bitmaps([self.windows[i] for i in index.tolist()], self.origins[index])

    def to(self, device: torch.device | str) -> Bitmaps:
        """The same masks on ``device``, moved in one piece: each alone would wait for a GPU."""
        import torch

        origins = self.origins.to(device)
        if not self.windows or origins.device == self.origins.device:
            return Bitmaps(self.windows, origins)
        pixels = torch.cat([window.flatten() for window in self.windows]).to(device)
        pieces = torch.split(pixels, [window.numel() for window in self.windows])
        views = [piece.view(one.shape) for piece, one in zip(pieces, self.windows, strict=True)]
        return Bitmaps(views, origins)

    def areas(self) -> Tensor:
        """Pixels of each mask, ``[N]`` int64."""
        import torch

        if not self.windows:
            return self.origins[:, 0]
        return torch.stack([window.sum() for window in self.windows])

    @classmethod
    def of(cls, masks: Tensor) -> Bitmaps:
        """From dense masks ``[N, H, W]`` (bool or 0/1): each cut to the box of its pixels."""
        import torch

        windows, origins = [], []
        for mask in masks.to(torch.uint8):
            ys, xs = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            y1, y2 = (int(ys[0]), int(ys[-1]) + 1) if len(ys) else (0, 0)
            x1, x2 = (int(xs[0]), int(xs[-1]) + 1) if len(xs) else (0, 0)
            windows.append(mask[y1:y2, x1:x2].clone())
            origins.append((x1, y1))
        return cls(windows, torch.tensor(origins, dtype=torch.int64).reshape(-1, 2))

    def dense(self, size: tuple[int, int]) -> Tensor:
        """All masks as one ``[N, H, W]`` uint8 tensor of ``size`` (H, W): for small frames."""
        import torch

        device = self.origins.device
        masks = torch.zeros((len(self), *size), dtype=torch.uint8, device=device)
        for mask, window, (x, y) in zip(masks, self.windows, self.origins.tolist(), strict=True):
            mask[y : y + window.shape[0], x : x + window.shape[1]] = window
        return masks

    def boxes(self) -> Tensor:
        """``[N, 4]`` tight boxes around the pixels set; a mask without any gives a zero box."""
        import torch

        boxes = torch.zeros(len(self), 4, device=self.origins.device)
        for box, window, (x, y) in zip(boxes, self.windows, self.origins.tolist(), strict=True):
            ys, xs = window.any(1).nonzero()[:, 0], window.any(0).nonzero()[:, 0]
            if len(ys):
                box.copy_(torch.stack([xs[0] + x, ys[0] + y, xs[-1] + x + 1, ys[-1] + y + 1]))
        return boxes


@dataclass(frozen=True)
class Instances:
    """The objects of one picture: labels to learn from, or what a model found.

    Attributes:
        size: (height, width) of the frame that ``boxes`` and ``masks`` live in.
        boxes: ``[N, 4]`` float32 xyxy pixels.
        labels: ``[N]`` int64, 0..K-1.
        scores: ``[N]`` in 0..1, predictions only: float32, and float64 when calibrated.
        masks: labels only: the true masks.
        logits: predictions only: ``[N, h, w]`` mask logits of the predicted class that span
            ``boxes``, or more:
        margin: the share of a box's sides by which the mask reaches beyond it, on every side.
        spans: ``[N, 4]`` xyxy pixels, what the logits span where a method predicts them for
            more than the box (a larger RoI, the whole picture); a mask still ends at its box and
            the margin.
        semantic: labels only: ``[H, W]`` uint8, the class of each pixel of things and stuff in a
            table of its own, 255 where nobody said; None without such maps.
    """

    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    masks: Bitmaps | None = None
    logits: Tensor | None = None
    margin: float = 0.0
    spans: Tensor | None = None
    semantic: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor) -> Instances:
        """The objects at ``index`` (int64 ``[M]`` or bool ``[N]``), in that order."""
        return replace(
            self,
            boxes=self.boxes[index],
            labels=self.labels[index],
            scores=None if self.scores is None else self.scores[index],
            masks=None if self.masks is None else self.masks[index],
            logits=None if self.logits is None else self.logits[index],
            spans=None if self.spans is None else self.spans[index],
        )

    def to(self, device: torch.device | str) -> Instances:
        """The same objects on ``device``."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        return Instances(
            self.size,
            self.boxes.to(device),
            self.labels.to(device),
            move(self.scores),
            None if self.masks is None else self.masks.to(device),
            move(self.logits),
            self.margin,
            move(self.spans),
            semantic=move(self.semantic),
        )


@runtime_checkable
class Segmenter(Protocol):
    """What every method is: a module with two verbs.

    ``loss`` and ``predict`` never look at ``self.training`` but for dropout and norms.
    """

    num_classes: int

    def loss(self, images: Images, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Named losses; their sum is what training minimises.

        Names that start with ``raw_`` are for the log only (detached) and are not summed.
        An image without objects is legal; every loss is then finite.
        """
        ...

    def features(self, images: Images) -> Any:
        """What `predict` works out of a batch first, to predict from it more than once."""
        ...

    def predict(
        self,
        images: Images,
        given: Sequence[Instances] | None = None,
        *,
        features: Any = None,
        margin: float = 0.0,
    ) -> list[Instances]:
        """Objects of each picture, best score first, in pixels of the picture given.

        A method without boxes gives those around its masks.

        Args:
            images: the batch.
            given: one Instances a picture; masks are then predicted for *these* boxes and
                labels and nothing is detected (mask quality given ground-truth boxes).
            features: of this batch, by `features`, if they are there already.
            margin: share of a box's sides by which the RoI of its mask is larger, on every side.
        """
        ...
