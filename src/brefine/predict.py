"""From a picture to its objects, in the picture's own pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from brefine import weights
from brefine.data.transforms import resize
from brefine.exported import is_exported
from brefine.header import limits
from brefine.metrics.calibration import IDENTITY, Calibration
from brefine.parts.backbone import Backbone
from brefine.parts.boxes import clip
from brefine.parts.inference import prepare
from brefine.parts.masks import on_boxes, to_records
from brefine.progress import track
from brefine.results import Result, of_records
from brefine.sources import Picture, as_pixels
from brefine.structures import Category, Images, InputError, Instances, Segmenter
from brefine.tiling import choose_tile, lay, merge
from brefine.views import PLAIN, View, fuse

#: cells a side of a mask that is the mean of several views, where they were not on one grid
AVERAGED = 112


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
        calibration: from the model's scores to probabilities.
        margin: share of a box's sides, 0..1, by which the RoI that its mask is predicted in is
            larger, on every side: masks are then not cut at a box that is too small.
        device: None: a GPU if there is one.

    Raises:
        InputError: categories or thresholds do not match the model, or a margin outside of 0..1.
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
        calibration: Calibration = IDENTITY,
        margin: float = 0.0,
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
        self.calibration = calibration
        self.margin = margin
        self.exported = False  # an exported file can only detect

    @property
    def margin(self) -> float:
        """The share of a box's sides, 0..1, by which a mask's RoI is larger on every side."""
        return self._margin

    @margin.setter
    def margin(self, margin: float) -> None:
        if not 0 <= margin <= 1:
            raise InputError(f"margin {margin}: expected a share of the box, 0 to 1")
        self._margin = margin

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: torch.device | str | None = None,
        *,
        compile: bool = False,
    ) -> Predictor:
        """The predictor of a model folder, or of an exported file, at the size of evaluation.

        Args:
            folder: see above.
            device: None: a GPU if there is one.
            compile: the trunk, with ``torch.compile``: the first pictures then take minutes, the
                others less. For GPUs: on a CPU it does without what ``prepare`` makes quicker.

        Raises:
            InputError: see ``weights.load`` and ``exported.Session``; or nothing can be compiled.
        """
        if is_exported(folder):
            if compile:
                raise InputError(f"{folder} is exported already: --compile is for model folders")
            return cls._exported(Path(folder), device)
        model = weights.load(folder)
        data = model.recipe.data
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        segmenter = cast(nn.Module, model.segmenter)
        if compile:
            for module in segmenter.modules():
                if isinstance(module, Backbone):
                    _compile(module, device)
        elif device.type == "cpu":
            prepare(segmenter)
        return cls(
            segmenter,
            model.categories,
            short_side=data.short_side[-1],
            long_side=data.long_side,
            thresholds=model.thresholds,
            overall=model.overall,
            calibration=model.calibration,
            device=device,
        )

    @classmethod
    def _exported(cls, file: Path, device: torch.device | str | None) -> Predictor:
        from brefine.export import open_exported  # brings the exporter along

        model, session = open_exported(file)
        predictor = cls(
            model,
            session.categories,
            short_side=session.short_side,
            long_side=session.long_side,
            thresholds=session.thresholds,
            overall=session.overall,
            calibration=session.calibration,
            device=device,
        )
        predictor.exported = True
        return predictor

    def __call__(
        self,
        picture: Picture,
        *,
        threshold: float | None = None,
        views: Sequence[View] = PLAIN,
        tile: int | Literal["auto"] | None = None,
        overlap: int | None = None,
        channels: str = "RGB",
    ) -> Result:
        """The objects of a picture, best score first.

        Args:
            picture: a file, its bytes, a PIL picture (EXIF orientation applied), an array
                ``[H, W, 3]`` or a tensor ``[3, H, W]`` uint8; see ``sources.as_pixels``.
            threshold: objects with a lower score are dropped; 0 keeps all the model gives;
                None: the model's own for each class.
            views: ways to look at it whose boxes and masks are averaged: ``views.combine(...)``.
            tile: see ``records``.
            overlap: see ``records``.
            channels: the order in an array or a tensor, ``RGB`` or ``BGR``.

        Raises:
            InputError: no picture, or an array of another shape or type.
        """
        pixels = as_pixels(picture, channels)
        if tile is None:
            found = self.detect(pixels, threshold=threshold, views=views)
        else:
            options: dict[str, Any] = {"views": views, "tile": tile, "overlap": overlap}
            records = self.records(pixels, 0, threshold=threshold, **options)
            found = of_records(records, (pixels.shape[1], pixels.shape[2]), self.categories)
        kept = picture if isinstance(picture, str | Path) else pixels.clone()  # it may be reused
        return Result(found, self.categories, kept)

    @torch.inference_mode()
    def detect(
        self,
        picture: Picture,
        *,
        threshold: float | None = None,
        views: Sequence[View] = PLAIN,
    ) -> Instances:
        """The objects of a picture as the model gives them; arguments as in the call.

        Returns:
            Boxes in the picture's pixels, labels, scores and mask logits ``[N, S, S]``.
        """
        if not views or not all(isinstance(view, View) for view in views):
            raise InputError(f"views {views!r}: expected those of brefine.views.combine")
        pixels = as_pixels(picture)
        if len(views) == 1:
            images, size = self._resize(pixels, views[0])
            return self._above(self._detect(images, size, view=views[0]), threshold)
        seen = []
        for view in views:
            images, size = self._resize(pixels, view)
            features = self.model.features(images)
            seen.append((images, features, view))
        found = fuse(
            [self._detect(images, size, features, view) for images, features, view in seen]
        )
        found = self._above(found, threshold)
        masks = [self._fill(images, found, features, view) for images, features, view in seen]
        return self._filled(found, masks)

    @torch.inference_mode()
    def several(
        self, pictures: Sequence[Picture], *, threshold: float | None = None
    ) -> list[Instances]:
        """The objects of each of several pictures: what ``detect`` finds in it.

        Those that have one size for the network go through it together. Others are not padded to
        a common size, since padding changes what is found beside it.

        Args:
            pictures: as in the call.
            threshold: as in the call.
        """
        seen = [self._resize(as_pixels(picture)) for picture in pictures]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (images, _) in enumerate(seen):
            groups.setdefault((*images.pixels.shape, *images.sizes[0].tolist()), []).append(i)
        found: dict[int, Instances] = {}
        for members in groups.values():
            images = Images(
                torch.cat([seen[i][0].pixels for i in members]),
                torch.cat([seen[i][0].sizes for i in members]),
            )
            objects = self.model.predict(images, margin=self.margin)
            for i, each in zip(members, objects, strict=True):
                found[i] = self._above(self._framed(each, seen[i][1]), threshold)
        return [found[i] for i in range(len(seen))]

    @torch.inference_mode()
    def given(
        self, picture: Picture, target: Instances, *, views: Sequence[View] = PLAIN
    ) -> Instances:
        """Masks for known boxes and labels, in their order: what the mask head alone can do.

        Args:
            picture: as above.
            target: boxes in the picture's pixels, and labels.
            views: as above.

        Returns:
            ``target``'s boxes and labels with ``logits [N, S, S]``; scores are 1.
        """
        pixels = as_pixels(picture)
        masks = [self._fill(self._resize(pixels, view)[0], target, view=view) for view in views]
        return self._filled(self._certain(target), masks)

    @torch.inference_mode()
    def both(self, picture: Picture, target: Instances) -> tuple[Instances, Instances]:
        """All that the model detects, and masks for known boxes, from one pass of the trunk.

        Returns:
            The same as ``detect(picture, threshold=0)`` and ``given(picture, target)``.
        """
        images, size = self._resize(as_pixels(picture))
        features = self.model.features(images)
        found = self._above(self._detect(images, size, features), 0.0)
        return found, self._filled(self._certain(target), [self._fill(images, target, features)])

    def records(
        self,
        picture: Picture,
        image_id: int | str,
        *,
        threshold: float | None = None,
        views: Sequence[View] = PLAIN,
        tile: int | Literal["auto"] | None = None,
        overlap: int | None = None,
        progress: bool = False,
    ) -> list[dict[str, Any]]:
        """COCO results of a picture, best score first.

        Args:
            picture: as in the call.
            image_id: the picture's id.
            threshold: as in the call.
            views: as in the call.
            tile: side of tiles in the picture's pixels, which are looked at one by one, each like
                a picture, and whose results are merged; "auto": by ``tiling.choose_tile``; None:
                the picture is looked at as a whole.
            overlap: pixels that tiles share; None: an eighth of a tile.
            progress: show the tiles.

        Raises:
            InputError: as in the call, or an overlap that does not fit the tiles.
        """
        pixels = as_pixels(picture)
        size = (pixels.shape[1], pixels.shape[2])
        if tile == "auto":
            tile = choose_tile(size, self.short_side, self.long_side)
        grid = lay(size, tile, overlap)
        count = len(grid.tiles)
        found = []
        for x1, y1, x2, y2 in track(grid.tiles, "tiles", count) if progress else grid.tiles:
            seen = self.detect(pixels[:, y1:y2, x1:x2], threshold=threshold, views=views)
            found.append(to_records(seen, image_id, self.categories, seen.size))
        return merge(found, grid)

    def records_of(
        self,
        pictures: Sequence[Picture],
        ids: Sequence[int | str],
        *,
        threshold: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """COCO results of each of several pictures: what ``several`` finds, with the ids given."""
        found = self.several(pictures, threshold=threshold)
        return [
            to_records(each, id, self.categories, each.size)
            for each, id in zip(found, ids, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """Everything that a prediction follows from, the weights as a hash."""
        weights = hashlib.blake2b(digest_size=16)
        for name, value in sorted(cast(nn.Module, self.model).state_dict().items()):
            weights.update(name.encode())
            weights.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        rest = {key: value for key, value in vars(self).items() if key not in ("model", "device")}
        return {**rest, "weights": weights.hexdigest()}

    def _resize(self, pixels: Tensor, view: View = PLAIN[0]) -> tuple[Images, tuple[int, int]]:
        """The picture as the model takes it, and its own (height, width)."""
        short, long = (max(1, round(s * view.scale)) for s in (self.short_side, self.long_side))
        small, _ = resize(pixels, None, short, long)
        small = small.flip(-1) if view.flip else small
        return Images.stack([small]).to(self.device), (pixels.shape[1], pixels.shape[2])

    def _detect(
        self,
        images: Images,
        size: tuple[int, int],
        features: Any = None,
        view: View = PLAIN[0],
    ) -> Instances:
        """All that the model gives, in a picture of (height, width), with calibrated scores."""
        found = self.model.predict(images, features=features, margin=self.margin)[0]
        return self._framed(found, size, view)

    def _framed(self, found: Instances, size: tuple[int, int], view: View = PLAIN[0]) -> Instances:
        """What the model gave, in a picture of (height, width), with calibrated scores."""
        found = view.turn(found.to("cpu"))
        found = _scale(found, size)
        found = replace(found, boxes=clip(found.boxes, torch.tensor(size)))
        assert found.scores is not None
        return replace(found, scores=torch.from_numpy(self.calibration(found.scores.numpy())))

    def _above(self, found: Instances, threshold: float | None) -> Instances:
        """The objects whose score is high enough."""
        least = limits(self.thresholds, threshold)
        assert found.scores is not None
        # In single precision: a score of 0.7 that the model computed in it is not below 0.7.
        return found[found.scores.float() >= torch.tensor(least)[found.labels]]

    def _fill(
        self, images: Images, target: Instances, features: Any = None, view: View = PLAIN[0]
    ) -> Instances:
        """Known boxes, with mask logits, in their frame."""
        height, width = images.sizes[0].tolist()
        asked = Instances(target.size, target.boxes, target.labels)
        asked = view.turn(_scale(asked, (height, width))).to(self.device)
        found = self.model.predict(images, [asked], features=features, margin=self.margin)[0]
        return _scale(view.turn(found.to("cpu")), target.size)

    def _filled(self, found: Instances, views: Sequence[Instances]) -> Instances:
        """Objects with the mask logits that a view gave, or the mean of those of several."""
        logits, spans = views[0].logits, views[0].spans
        if len(views) > 1:
            each = [one.logits if spans is None else on_boxes(one, AVERAGED) for one in views]
            logits, spans = torch.stack([one for one in each if one is not None]).mean(0), None
        return replace(found, logits=logits, spans=spans, margin=self.margin)

    @staticmethod
    def _certain(target: Instances) -> Instances:
        return replace(target, scores=torch.ones(len(target)), masks=None)


def load(
    folder: Path | str, device: torch.device | str | None = None, *, compile: bool = False
) -> Predictor:
    """Open a model folder or an exported file for prediction: ``Predictor.load``."""
    return Predictor.load(folder, device, compile=compile)


def _compile(trunk: Backbone, device: torch.device) -> None:
    """Compile a trunk now, so that one who cannot is told before anything is written."""
    trunk.compile(dynamic=True)
    try:
        with torch.inference_mode():
            blank = Images.stack([torch.zeros(3, 64, 96, dtype=torch.uint8)])
            trunk.to(device).eval()(blank.to(device))
    except RuntimeError as error:
        raise InputError(
            f"--compile: cannot compile ({type(error).__name__}): it takes a C++ compiler, or "
            "Triton on a GPU: leave out --compile"
        ) from None


def _scale(instances: Instances, size: tuple[int, int]) -> Instances:
    """The same objects in a frame of another (height, width)."""
    y, x = size[0] / instances.size[0], size[1] / instances.size[1]
    factors = instances.boxes.new_tensor([x, y, x, y])
    spans = None if instances.spans is None else instances.spans * factors
    return replace(instances, size=size, boxes=instances.boxes * factors, spans=spans)
