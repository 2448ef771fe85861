"""From a picture to its objects, in the picture's own pixels."""

from __future__ import annotations

import glob
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
from brefine.data.pictures import SUFFIXES
from brefine.data.read import read
from brefine.data.transforms import resize
from brefine.files import replacing
from brefine.formats import write_coco, write_mask_pngs
from brefine.parts.boxes import clip
from brefine.parts.masks import to_records
from brefine.progress import console, track
from brefine.structures import Category, Images, InputError, Instances, Segmenter

FORMATS = ("coco", "png", "overlay")

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
        limits = self.thresholds if threshold is None else [threshold] * len(self.categories)
        assert found.scores is not None
        return found[found.scores >= torch.tensor(limits)[found.labels]]

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


def predict_files(
    predictor: Predictor,
    sources: Sequence[str | Path],
    out: Path | str,
    *,
    threshold: float | None = None,
    formats: Sequence[str] = FORMATS,
    data: Path | str | None = None,
    images: Path | str | None = None,
    skip_broken: bool = False,
) -> list[Path]:
    """Predict pictures and write the results to a folder that appears when all is done.

    ``predictions.json`` holds COCO results, ``masks/`` what ``formats.write_mask_pngs`` writes,
    ``overlays/`` the pictures with their objects drawn in.

    Args:
        predictor: the model.
        sources: see ``find_pictures``.
        out: folder to write; one from an earlier call is replaced as a whole.
        threshold: see ``Predictor``.
        formats: some of ``FORMATS``.
        data: labelled set, of any format, that knows the pictures: its ids become the records'
            ``image_id``, which is else the picture's name.
        images: folder of ``data``'s pictures.
        skip_broken: name pictures that cannot be read and go on, instead of stopping.

    Returns:
        The pictures skipped.

    Raises:
        InputError: no picture, one that cannot be read (nothing is written then) or that
            ``data`` does not know, or ``out`` holds something else.
    """
    from brefine.draw import overlay  # brings evaluation along: too much for one picture

    out = Path(out)
    own = {"predictions.json", "masks", "overlays"}
    if out.exists() and (not out.is_dir() or any(path.name not in own for path in out.iterdir())):
        raise InputError(f"{out}: holds something else than predictions: choose another folder")
    pictures = find_pictures(sources)
    ids: dict[Path, int | str] = {path: name for name, path in pictures.items()}
    if data is not None:
        known = {picture.file.resolve(): picture.id for picture in read(data, images).pictures}
        for path in ids:
            if path.resolve() not in known:
                raise InputError(f"{path}: {data} does not list this picture: leave it out")
            ids[path] = known[path.resolve()]
    records: list[dict[str, Any]] = []
    broken: list[Path] = []
    with replacing(out) as aside:
        aside.mkdir()
        for name, path in track(pictures.items(), "predict", len(pictures)):
            try:
                pixels = read_picture(path)
            except InputError as error:
                if not skip_broken:
                    raise
                console.print(f"skipped: {error}", markup=False, soft_wrap=True)
                broken.append(path)
                continue
            found = predictor(pixels, threshold=threshold)
            of_picture = to_records(found, ids[path], predictor.categories, found.size)
            records += of_picture
            if "png" in formats:
                write_mask_pngs(aside / "masks", name, of_picture, found.size, predictor.categories)
            if "overlay" in formats:
                drawn = (aside / "overlays" / name).with_suffix(".png")
                drawn.parent.mkdir(parents=True, exist_ok=True)
                overlay(pixels, of_picture, predictor.categories).save(drawn)
        if "coco" in formats:
            write_coco(aside / "predictions.json", records)
    return broken


def find_pictures(sources: Sequence[str | Path]) -> dict[str, Path]:
    """Pictures by the name that their results get.

    Args:
        sources: files; folders, of which every picture is taken, also from folders inside (by
            suffix, see ``SUFFIXES``); patterns such as ``photos/*.jpg`` or ``photos/**/*.jpg``.

    Returns:
        In the order of ``sources``, sorted inside each. The name is the file's, and inside a
        folder given its path from there.

    Raises:
        InputError: nothing there, or two pictures would get the same name.
    """
    found: dict[str, Path] = {}
    stems: dict[str, Path] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            named = [(p.relative_to(path).as_posix(), p) for p in inside]
        elif path.exists() or not glob.has_magic(str(source)):
            named = [(path.name, path)]
        else:
            matches = sorted(glob.glob(str(source), recursive=True))
            named = [(Path(match).name, Path(match)) for match in matches]
        if not named:
            raise InputError(f"{source}: no pictures there (looking for {' '.join(SUFFIXES)})")
        for name, file in named:
            if not file.is_file():
                raise InputError(f"{file}: no such picture")
            stem = str(Path(name).with_suffix(""))
            if stem in stems and stems[stem] != file:
                raise InputError(
                    f"{file}: its results would have the name of those of {stems[stem]}: "
                    "predict them into two folders"
                )
            found[name], stems[stem] = file, file
    return found


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
