"""From a picture to its objects, in the picture's own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from brefine import weights
from brefine.data.loader import read_picture, to_tensor
from brefine.data.transforms import resize
from brefine.parts.boxes import clip
from brefine.parts.masks import to_records
from brefine.structures import Category, Images, InputError, Instances, Segmenter

#: a file, a PIL picture, RGB ``[H, W, 3]`` uint8, or RGB ``[3, H, W]`` uint8
Picture = str | Path | Image.Image | NDArray[Any] | Tensor


class Predictor:
    """A model with everything that belongs to it: classes, size and thresholds.

    Args:
        model: any Segmenter; it is moved to ``device`` and put in evaluation mode.
        categories: label ``i`` is row ``i``.
        short_side: pixels the picture's short side is resized to, unless
        long_side: the long side would then exceed this.
        thresholds: score from which an object is reported, 0..1, one for all or one a label.
        device: None: a GPU if there is one.

    Raises:
        InputError: categories or thresholds do not match the model.
    """

    def __init__(
        self,
        model: nn.Module,
        categories: Sequence[Category],
        *,
        short_side: int = 800,
        long_side: int = 1333,
        thresholds: Sequence[float] | float = 0.5,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = cast(Segmenter, model.to(self.device).eval())
        self.categories = list(categories)
        self.short_side, self.long_side = short_side, long_side
        count = len(self.categories)
        each = [thresholds] * count if isinstance(thresholds, int | float) else list(thresholds)
        if self.model.num_classes != count or len(each) != count:
            raise InputError(
                f"the model has {self.model.num_classes} classes, but there are {count} categories "
                f"and {len(each)} thresholds: give one of each a class"
            )
        self.thresholds = [float(value) for value in each]

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str | None = None) -> Predictor:
        """The predictor of a model folder, at the size it was evaluated with.

        Raises:
            InputError: see ``weights.load``.
        """
        model = weights.load(folder)
        data = model.recipe.data
        return cls(
            cast(nn.Module, model.segmenter),
            model.categories,
            short_side=data.short_side[-1],
            long_side=data.long_side,
            thresholds=model.thresholds,
            device=device,
        )

    @torch.inference_mode()
    def __call__(self, picture: Picture, *, threshold: float | None = None) -> Instances:
        """The objects of a picture, best score first.

        Args:
            picture: a file, a PIL picture (EXIF orientation applied), a numpy array
                ``[H, W, 3]`` uint8 or a tensor ``[3, H, W]`` uint8; RGB.
            threshold: objects with a lower score are dropped; 0 keeps all the model gives;
                None: the model's own for each class.

        Returns:
            Boxes in the picture's pixels, labels, scores and mask logits ``[N, S, S]``.

        Raises:
            InputError: no picture, or an array of another shape or type.
        """
        pixels = as_pixels(picture)
        height, width = pixels.shape[1:]
        small, _ = resize(pixels, None, self.short_side, self.long_side)
        found = self.model.predict(Images.stack([small]).to(self.device))[0].to("cpu")
        found = _scale(found, (height, width))
        found = replace(found, boxes=clip(found.boxes, torch.tensor([height, width])))
        limits = self.thresholds if threshold is None else [threshold] * len(self.categories)
        assert found.scores is not None
        return found[found.scores >= torch.tensor(limits)[found.labels]]

    @torch.inference_mode()
    def given(self, picture: Picture, target: Instances) -> Instances:
        """Masks for known boxes and labels, in their order: what the mask head alone can do.

        Args:
            picture: as above.
            target: boxes in the picture's pixels, and labels.

        Returns:
            ``target``'s boxes and labels with ``logits [N, S, S]``; scores are 1.
        """
        pixels = as_pixels(picture)
        small, _ = resize(pixels, None, self.short_side, self.long_side)
        images = Images.stack([small]).to(self.device)
        asked = _scale(replace(target, masks=None), (small.shape[1], small.shape[2]))
        found = self.model.predict(images, [asked.to(self.device)])[0].to("cpu")
        scores = torch.ones(len(target))
        return replace(target, scores=scores, masks=None, logits=found.logits)

    def records(
        self, picture: Picture, image_id: int | str, *, threshold: float | None = None
    ) -> list[dict[str, Any]]:
        """COCO results of a picture; arguments and errors as in the call."""
        found = self(picture, threshold=threshold)
        return to_records(found, image_id, self.categories, found.size)


def load(folder: Path | str, device: torch.device | str | None = None) -> Predictor:
    """Open a model folder for prediction: ``Predictor.load``."""
    return Predictor.load(folder, device)


def as_pixels(picture: Picture) -> Tensor:
    """RGB ``[3, H, W]`` uint8 from whatever ``Predictor`` takes.

    Raises:
        InputError: no picture, or an array of another shape or type.
    """
    if isinstance(picture, str | Path):
        return read_picture(picture)
    if isinstance(picture, Image.Image):
        return to_tensor(picture)
    if isinstance(picture, np.ndarray):
        found, want = f"array {list(picture.shape)} {picture.dtype}", "[H, W, 3]"
        fits = picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
        pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1) if fits else None
    elif isinstance(picture, Tensor):
        found, want = f"tensor {list(picture.shape)} {picture.dtype}", "[3, H, W]"
        fits = picture.ndim == 3 and picture.shape[0] == 3 and picture.dtype == torch.uint8
        pixels = picture.cpu() if fits else None
    else:
        found, want, pixels = type(picture).__name__, "[H, W, 3]", None
    if pixels is None or not pixels.numel():
        raise InputError(
            f"picture: expected RGB {want} uint8, a PIL picture or a file, not {found}"
        )
    return pixels


def _scale(instances: Instances, size: tuple[int, int]) -> Instances:
    """The same boxes in a frame of another (height, width)."""
    y, x = size[0] / instances.size[0], size[1] / instances.size[1]
    factors = instances.boxes.new_tensor([x, y, x, y])
    return replace(instances, size=size, boxes=instances.boxes * factors)
