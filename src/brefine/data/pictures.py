"""Picture files: which there are, how large they are, and which labels belong to them."""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from brefine.data.faults import Id, Report, reason_of, refuse, reporting
from brefine.progress import console, track
from brefine.structures import InputError

#: pixels; a larger picture is refused before memory is taken. Pillow itself stops just above.
MAX_PIXELS = 178_000_000
#: of pictures inside a folder
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
#: file with class names, one a line
CLASSES = "classes.txt"
#: what is said of a picture that is not there
MISSING = "no such picture"
#: the largest value of 12 bits: a 16-bit picture without a larger one is below 16 of 255
DARK = 4095
#: EXIF orientations by which a picture is turned by a quarter
_QUARTER_TURNS = (5, 6, 7, 8)
_lock = threading.Lock()
_silent = ExitStack()
_readers = 0
_told = False  # of a dark picture


@contextmanager
def open_picture(path: Path | str, content: bytes | None = None) -> Iterator[Image.Image]:
    """A picture file, opened; whatever goes wrong with it in the block becomes one line.

    Args:
        path: the file.
        content: what is in it, where that is here already; ``path`` is then only its name.

    Raises:
        InputError: not there, no picture, damaged or too large; names the file.
    """
    try:
        # Given a path, Pillow maps plain TIFFs into memory and then mixes up their rows where the
        # EXIF orientation says a quarter turn; given an open file it reads them.
        opened = open(path, "rb") if content is None else io.BytesIO(content)  # noqa: SIM115
        with opened as file, _silence(), Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except FileNotFoundError:
        raise InputError(f"{path}: {MISSING}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: no picture, or of a format that Pillow cannot read") from None
    except Image.DecompressionBombError:
        limit = f"{MAX_PIXELS // 10**6} million pixels"
        raise InputError(f"{path}: larger than {limit}: cut it into tiles") from None
    except InputError as error:  # of whoever looks at the picture
        told = str(error).startswith(f"{path}: ")
        raise (error if told else InputError(f"{path}: cannot read the picture: {error}")) from None
    except Exception as error:
        # Decoders of damaged files raise nearly anything: SyntaxError, struct.error, IndexError.
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise InputError(f"{path}: cannot read the picture: {reason}") from None


def read_rgb(path: Path | str, content: bytes | None = None) -> NDArray[np.uint8]:
    """A picture file as by `take_rgb`; arguments and errors as those of `open_picture`."""
    with open_picture(path, content) as image:
        return take_rgb(image, path)


def take_rgb(image: Image.Image, name: Path | str) -> NDArray[np.uint8]:
    """`to_rgb`; one picture of a process that it makes nearly black is named on the console.

    Processes that read for another one say nothing: each would do so.

    Args:
        image: a Pillow picture.
        name: what to call it.
    """
    global _told
    pixels = to_rgb(image)
    if (most := find_dark(image)) and multiprocessing.parent_process() is None:
        with _lock:
            told, _told = _told, True
        if not told:
            console.print(
                f"{name}: 16 bits, but no value above {most}, which is nearly black: stretch "
                "values to 0..65535 first (other such pictures are not named)",
                markup=False,
                soft_wrap=True,
            )
    return pixels


def find_dark(image: Image.Image) -> int | None:
    """The largest value of a 16-bit picture if `to_rgb` makes it nearly black, else None.

    That is one from 1 to ``DARK``; a picture of zeros is black whatever is done.
    """
    if not image.mode.startswith("I"):
        return None
    most = int(np.asarray(image).max())
    return most if 0 < most <= DARK else None


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings: damage that matters ends as an error. Any number of threads may be inside."""
    global _readers
    with _lock:
        _readers += 1
        if _readers == 1:  # Python's own block, left in another order than entered, stays silent
            _silent.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                _silent.close()


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """A Pillow picture as upright RGB with 8 bits, ``[H, W, 3]``.

    The EXIF orientation is applied; grey is repeated; a palette is looked up; transparent parts
    show white; CMYK is converted as Pillow does; 16-bit grey is taken as 0..65535 and divided by
    257; of several frames the first is taken.

    Raises:
        InputError: its values have no known range (floats, 32-bit integers above 65535).
    """
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError("grey values outside of 0..65535: convert it to 8 or 16 bits")
        pixels = np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    elif upright.mode == "F":
        raise InputError("floating-point values: convert it to 8 or 16 bits")
    else:
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        pixels = np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))
    return pixels


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture after its EXIF orientation; its pixels are not decoded.

    Raises:
        InputError: as ``open_picture``.
    """
    with open_picture(path) as image:
        # The PNG reader's own getexif decodes all pixels to find a tag behind them.
        late = image.format == "PNG" and _tags_behind(path)
        exif = image.getexif() if late else Image.Image.getexif(image)
        turned = exif.get(0x0112) in _QUARTER_TURNS
        width, height = image.size
    return (width, height) if turned else (height, width)


def _tags_behind(path: Path) -> bool:
    """Whether a PNG has chunks behind its pixels that may say how it is turned."""
    behind = False
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            behind = behind or kind == b"IDAT"
            if behind and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)  # content and checksum
    return False


def network_size(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """The (height, width) a picture of ``size`` is resized to.

    The short side becomes ``short`` unless the long side would exceed ``long``; the other side
    follows, rounded, at least 1.
    """
    scale = min(short / min(size), long / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def measure(path: Path, id: Id, report: Report) -> tuple[int, int] | None:
    """``upright_size``; what keeps it from being read is reported, and None returned."""
    try:
        return upright_size(path)
    except InputError as error:
        reason = reason_of(error, path)
        report("missing-picture" if reason == MISSING else "unreadable-picture", path, id, reason)
    return None


def list_pictures(folder: Path) -> list[Path]:
    """Every picture in a folder and the folders inside, by suffix, sorted.

    Raises:
        InputError: there is none.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise InputError(f"{folder}: no pictures there (looking for {' '.join(SUFFIXES)})")
    return found


def by_name(pictures: Sequence[Path], folder: Path, report: Report = refuse) -> dict[str, Path]:
    """Pictures by their path inside ``folder``, which is what predictions are named by.

    Two that differ in nothing but the suffix are a fault: their labels would be the same file.
    """
    stems: dict[Path, Path] = {}
    named: dict[str, Path] = {}
    for path in pictures:
        name = (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
        other = stems.setdefault(path.with_suffix(""), path)
        if other == path:
            named[name] = path
        else:
            message = f"its labels would be those of {other.name}: rename one"
            report("same-labels", path, name, message)
    return named


def find_pair(path: Path, labels: str) -> tuple[Path, Path] | None:
    """The folders of pictures and of labels that ``path`` means, if it means any.

    ``path`` holds the folders ``images`` and ``labels``, or is one of those two, or is a folder
    somewhere in one of them that the other has, too (``images/train`` and ``labels/train``).

    Args:
        path: a folder.
        labels: name of the folder of labels.
    """
    if (path / "images").is_dir() and (path / labels).is_dir():
        return path / "images", path / labels
    if labels in path.parts and (pictures := swap(path, labels, "images")).is_dir():
        return pictures, path
    if "images" in path.parts and (beside := swap(path, "images", labels)).is_dir():
        return path, beside
    return None


def swap(path: Path, old: str, new: str) -> Path:
    """``path`` with its last part named ``old`` replaced; without one, as it is."""
    parts = list(path.parts)
    for position in reversed(range(len(parts))):
        if parts[position] == old:
            parts[position] = new
            break
    return Path(*parts)


def refuse_splits(folder: Path) -> None:
    """Refuse a folder whose folders are splits: training would see the validation pictures.

    Raises:
        InputError: ``folder`` holds ``train`` and one of ``val``, ``valid`` and ``test``.
    """
    splits = [name for name in ("train", "val", "valid", "test") if (folder / name).is_dir()]
    if len(splits) > 1:
        raise InputError(f"{folder}: holds {' and '.join(splits)}: name one, such as {splits[0]}")


def read_names(*folders: Path, report: Report = refuse) -> list[str] | None:
    """Class names from the first ``classes.txt`` in ``folders``, one a line; None: there is none.

    One that cannot be read, names a class twice or none, is a fault.
    """
    for folder in folders:
        file = folder / CLASSES
        if file.is_file():
            names: list[str] = []
            with reporting(report, "bad-names", file):
                names = [name for line in read_lines(file) if (name := line.strip())]
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice or not names:
                    fault = f"names {twice!r} twice" if twice else "holds no class name"
                    raise InputError(f"{file}: {fault}, expected one name a line")
            return names or None
    return None


def number_names(found: Iterable[str], given: Sequence[str] | None, origin: Path) -> dict[str, int]:
    """Category ids by name: 1, 2, ... in sorted order.

    Args:
        found: names that objects have.
        given: from ``classes.txt``: these and no others.
        origin: for the message.

    Raises:
        InputError: a name that ``given`` lacks.
    """
    names = set(found)
    if given is not None:
        strange = sorted(names - set(given))
        if strange:
            raise InputError(f"{origin}: class {strange[0]!r} is not in {CLASSES}: add it there")
        names = set(given)
    return {name: number for number, name in enumerate(sorted(names), 1)}


def read_lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        InputError: it cannot be read or is no text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: no text in UTF-8") from None


def watch(items: dict[str, Path]) -> Iterable[tuple[str, Path]]:
    """The items, with progress where there are many."""
    if len(items) < 500:
        return items.items()
    return track(items.items(), "read labels", len(items))
