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
from brefine.metrics.calibration import Calibration
from brefine.parts.boxes import clip
from brefine.parts.masks import to_records
from brefine.structures import Category, Images, InputError, Instances, Segmenter

#: a file, a PIL picture, RGB ``[H, W, 3]`` uint8, or RGB ``[3, H, W]`` uint8
Picture = str | Path | Image.Image | NDArray[Any] | Tensor


class Predictor:
    """A model with everything that belongs to it: classes, size, thresholds and calibration.

    Scores are probabilities: calibrated, in double precision, so that no two become equal.

    Args:
        model: any Segmenter; it is moved to ``device`` and put in evaluation mode.
        categories: label ``i`` is row ``i``.
        short_side: pixels the picture's short side is resized to, unless
        long_side: the long side would then exceed this.
        thresholds: score from which an object is reported, 0..1, one for all or one a label.
        overall: the best one for all labels, for who wants that instead.
        calibration: from the model's scores to probabilities; None: they are the same.
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
        overall: float = 0.5,
        calibration: Calibration | None = None,
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
        self.overall = overall
        self.calibration = calibration or Calibration()

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
            overall=model.overall,
            calibration=model.calibration,
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
        images, size = self._resize(picture)
        return self._detect(images, size, threshold)

    @torch.inference_mode()
    def given(self, picture: Picture, target: Instances) -> Instances:
        """Masks for known boxes and labels, in their order: what the mask head alone can do.

        Args:
            picture: as above.
            target: boxes in the picture's pixels, and labels.

        Returns:
            ``target``'s boxes and labels with ``logits [N, S, S]``; scores are 1.
        """
        images, _ = self._resize(picture)
        return self._fill(images, target)

    @torch.inference_mode()
    def both(self, picture: Picture, target: Instances) -> tuple[Instances, Instances]:
        """All that the model detects, and masks for known boxes, from one pass of the trunk.

        Returns:
            The same as ``self(picture, threshold=0)`` and ``self.given(picture, target)``.
        """
        images, size = self._resize(picture)
        features = self.model.features(images)
        found = self._detect(images, size, 0.0, features)
        return found, self._fill(images, target, features)

    def _resize(self, picture: Picture) -> tuple[Images, tuple[int, int]]:
        """The picture as the model takes it, and its own (height, width)."""
        pixels = as_pixels(picture)
        small, _ = resize(pixels, None, self.short_side, self.long_side)
        return Images.stack([small]).to(self.device), (pixels.shape[1], pixels.shape[2])

    def _detect(
        self, images: Images, size: tuple[int, int], threshold: float | None, features: Any = None
    ) -> Instances:
        found = self.model.predict(images, features=features)[0].to("cpu")
        found = _scale(found, size)
        found = replace(found, boxes=clip(found.boxes, torch.tensor(size)))
        assert found.scores is not None
        found = replace(found, scores=torch.from_numpy(self.calibration(found.scores.numpy())))
        limits = self.thresholds if threshold is None else [threshold] * len(self.categories)
        # In single precision: a score of 0.7 that the model computed in it is not below 0.7.
        return found[found.scores.float() >= torch.tensor(limits)[found.labels]]

    def _fill(self, images: Images, target: Instances, features: Any = None) -> Instances:
        height, width = images.sizes[0].tolist()
        asked = _scale(replace(target, masks=None), (height, width)).to(self.device)
        found = self.model.predict(images, [asked], features=features)[0].to("cpu")
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
