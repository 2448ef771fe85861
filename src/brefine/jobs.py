"""Many pictures predicted into one folder of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brefine.data.loader import read_picture
from brefine.data.read import read
from brefine.files import replacing
from brefine.formats import write_coco, write_mask_pngs
from brefine.parts.masks import to_records
from brefine.predict import Predictor
from brefine.progress import console, track
from brefine.sources import find_pictures
from brefine.structures import InputError

FORMATS = ("coco", "png", "overlay")


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
