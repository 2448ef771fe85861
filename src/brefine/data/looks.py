"""What the pictures of a set look like: readable, of the right size, and no two the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brefine.data.faults import Report, reason_of, shorten
from brefine.data.pictures import MISSING, find_dark, open_picture, to_rgb
from brefine.progress import track
from brefine.structures import InputError

#: side of the grey thumbnails that pictures are compared by, and the correlation of two of them
#: from which pictures are called alike: two frames of one scene reach 0.98, photographs of
#: different scenes 0.87
THUMBNAIL = 24
ALIKE = 0.95
#: grey levels; thumbnails that vary less show nothing to compare
FLAT = 2.0
#: pictures that are compared with all others at once
BLOCK = 256
#: EXIF orientations that leave height and width as they are (half a turn, mirrored)
SAME_SIZE = (2, 3, 4)


@dataclass(frozen=True)
class Listed:
    """One entry of a set's pictures; None: what the set does not say in a usable way.

    Attributes:
        id: of the picture.
        where: what to call it: ``picture 7``.
        file: where it should be.
        size: (height, width) that the labels were made for.
        measured: whether the labels say no size, and ``size`` is the picture's own.
    """

    id: int | str | None
    where: str
    file: Path | None
    size: tuple[int, int] | None
    measured: bool = False


@dataclass(frozen=True)
class Look:
    """What a readable picture is recognised by.

    Attributes:
        picture: its entry.
        file: where it is.
        origin: name of the set that lists it.
        size: (height, width), upright.
        digest: of the pixels.
        thumbnail: ``[THUMBNAIL ** 2]``, mean 0 and length 1; None: flat.
    """

    picture: Listed
    file: Path
    origin: str
    size: tuple[int, int]
    digest: bytes
    thumbnail: NDArray[np.float32] | None

    def aspect(self) -> float:
        """Logarithm of width / height."""
        return math.log(self.size[1] / self.size[0])


def look_at(
    pictures: Sequence[Listed], origin: str, report: Report, *, progress: bool
) -> list[Look]:
    """Read every picture and compare its size with the labels'; what the readable ones look like.

    Args:
        pictures: of a set.
        origin: name of the set.
        report: is called with every fault.
        progress: whether to show it on stderr.
    """
    looks: list[Look] = []
    title = f"check {Path(origin).name}"
    for picture in track(pictures, title, len(pictures)) if progress and pictures else pictures:
        if picture.file is None:
            continue
        where = f"{picture.where} ({shorten(picture.file.name)})"
        try:
            with open_picture(picture.file) as image:
                stored, orientation = (image.height, image.width), image.getexif().get(0x0112, 1)
                pixels, most = to_rgb(image), find_dark(image)
        except InputError as error:
            reason = reason_of(error, picture.file)
            kind = "missing-picture" if reason == MISSING else "unreadable-picture"
            if kind == "missing-picture":
                reason = f"no such picture: {picture.file}{_find_elsewhere(picture.file)}"
            report(kind, picture.file, picture.id, f"{where}: {reason}")
            continue
        size = pixels.shape[0], pixels.shape[1]
        _check_size(picture, where, size, stored, orientation, report)
        if most is not None:
            message = f"{where}: 16 bits, but no value above {most}, which is nearly black"
            report("dark-picture", picture.file, picture.id, message)
        digest = hashlib.blake2b(pixels.tobytes() + f"{size[1]}".encode(), digest_size=16).digest()
        thumbnail = _shrink(pixels)
        looks.append(Look(picture, picture.file, origin, size, digest, thumbnail))
    return looks


def _shrink(pixels: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """The thumbnail of a picture ``[H, W, 3]``."""
    grey = Image.fromarray(pixels).convert("L")
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, reducing_gap=None)
    thumbnail = np.asarray(small, dtype=np.float32).flatten()
    thumbnail -= thumbnail.mean()
    if float(thumbnail.std()) < FLAT:
        return None
    normal: NDArray[np.float32] = thumbnail / np.linalg.norm(thumbnail)
    return normal


def _find_elsewhere(file: Path) -> str:
    """A hint where a missing picture may be."""
    if "\\" in file.name:
        return " (a path in Windows' manner: write / for \\)"
    try:
        for other in file.parent.iterdir() if file.parent.is_dir() else ():
            if other.name.casefold() == file.name.casefold() or other.stem == file.stem:
                return f" (there is {other.name})"
    except (OSError, ValueError):
        pass
    return ""


def _check_size(
    picture: Listed,
    where: str,
    upright: tuple[int, int],
    stored: tuple[int, int],
    orientation: Any,
    report: Report,
) -> None:
    """The picture's size, as it is shown and as it is stored, against the json's."""
    said = picture.size
    if said is None or picture.file is None:
        return
    shown = f"{upright[0]} x {upright[1]} pixels (height x width)"
    text = f"{where}: {shown}, the json says {said[0]} x {said[1]}"
    turned = upright == stored[::-1] and orientation in range(5, 9)
    if said == upright:
        # Orientations that keep height and width leave open which way the labels were made.
        reason = ""
        if picture.measured and orientation in range(2, 9):
            reason = "the labels say no size that would tell whether they were made with it"
        elif orientation in SAME_SIZE or (turned and upright[0] == upright[1]):
            reason = "the size fits with and without it"
        if reason:
            message = f"{where}: has EXIF orientation {orientation}; {reason}"
            report("orientation", picture.file, picture.id, message)
    elif turned and said == stored:
        message = f"{text}: that fits the pixels as stored, before EXIF orientation {orientation}"
        report("turned-picture", picture.file, picture.id, message)
    elif said == upright[::-1]:
        report("swapped-size", picture.file, picture.id, f"{text}: exchanged")
    else:
        tried = f" (neither with nor without EXIF orientation {orientation})" * turned
        report("wrong-size", picture.file, picture.id, text + tried)


def compare(looks: Sequence[Sequence[Look]], report: Report, *, progress: bool) -> None:
    """Pictures that are the same or alike, inside each set and across the two.

    Each picture is named once a set that it has a twin in: the first one there.

    Args:
        looks: of one set or of two.
        report: is called with every picture that has a twin.
        progress: whether to show it on stderr, where it takes long.
    """
    unique: list[list[Look]] = []
    for group in looks:
        firsts: dict[bytes, Look] = {}
        for look in group:
            if look.digest in firsts:
                _name_pair(look, firsts[look.digest], "duplicate-picture", report)
            else:
                firsts[look.digest] = look
        unique.append(list(firsts.values()))
    for group in unique:
        for look, other in _alike(group, group, progress, earlier=True):
            _name_pair(look, other, "near-duplicate", report)
    if len(unique) == 2:
        theirs = {look.digest: look for look in unique[1]}
        for look in unique[0]:
            if look.digest in theirs:
                _name_pair(look, theirs[look.digest], "leaked-picture", report)
        rest = [look for look in unique[0] if look.digest not in theirs]
        for look, other in _alike(rest, unique[1], progress, earlier=False):
            _name_pair(look, other, "near-leak", report)


def _name_pair(look: Look, other: Look, kind: str, report: Report) -> None:
    same = "looks like" if kind.startswith("near") else "has the same pixels as"
    if look.file == other.file:
        same = "is the same file as"
    place = "" if look.origin == other.origin else f" of {other.origin}"
    message = f"{look.picture.where} ({look.file.name}) {same} {other.picture.where}"
    message += f" ({other.file.name}){place}"
    report(kind, look.file, look.picture.id, message)


def _alike(
    looks: Sequence[Look], others: Sequence[Look], progress: bool, *, earlier: bool
) -> Iterator[tuple[Look, Look]]:
    """Each of ``looks`` with the likest of ``others`` (of those before it, if ``earlier``)."""
    looks = [look for look in looks if look.thumbnail is not None]
    others = [look for look in others if look.thumbnail is not None]
    if not looks or not others:
        return
    columns = np.stack([look.thumbnail for look in others if look.thumbnail is not None])
    aspects = np.array([look.aspect() for look in others])
    starts = range(0, len(looks), BLOCK)
    shown = progress and len(looks) * len(others) > 10**8  # seconds
    for start in track(starts, "compare pictures", len(starts)) if shown else starts:
        block = looks[start : start + BLOCK]
        rows = np.stack([look.thumbnail for look in block if look.thumbnail is not None])
        scores = rows @ columns.T
        scores[np.abs(aspects - np.array([[look.aspect()] for look in block])) > 0.05] = 0
        if earlier:
            scores = np.tril(scores, start - 1)
        for look, score in zip(block, scores, strict=True):
            best = int(score.argmax())
            if score[best] >= ALIKE:
                yield look, others[best]
