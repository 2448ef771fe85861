"""What there is to predict: files, folders, patterns, lists, standard input, URLs, videos, cameras.

``find_pictures`` says what there is without opening a picture, ``walk`` gives the pictures one by
one, ready to be read. In Python, ``as_array`` and ``as_pixels`` take a picture in any form.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Union
from urllib import error, request
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brefine.data.pictures import MISSING, SUFFIXES, read_lines, read_rgb, take_rgb
from brefine.progress import console
from brefine.structures import InputError

if TYPE_CHECKING:  # pictures for exported models are read without torch
    from torch import Tensor

Pixels = NDArray[np.uint8]  #: ``[H, W, 3]``, RGB
#: a file, its content, a PIL picture or an array; see ``as_array``
Held = str | Path | bytes | Image.Image | NDArray[Any]
#: or a tensor; see ``as_pixels``
Picture = Union[Held, "Tensor"]

#: of video files
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
#: bytes of a picture that comes from elsewhere than a file
MOST_BYTES = 200 * 2**20
FRAMES = 7  # OpenCV's number of the property "frames in the video"
#: seconds until an answer, and for the whole of a picture, from a URL
PATIENCE, DEADLINE = 30.0, 120.0

_CAMERA = re.compile(r"camera:(\d+)")


class Item(NamedTuple):
    """A picture to predict.

    Attributes:
        name: what its results are named by; unique, also without the last suffix.
        place: where it is, for people: a path, a URL, a frame of a video.
        read: gives its pixels or raises InputError.
    """

    name: str
    place: str
    read: Callable[[], Pixels]


def find_pictures(
    sources: Sequence[str | Path], *, allow_urls: bool = False, missing: bool = False
) -> dict[str, str]:
    """What there is to predict, by the names that the results get.

    ==================  ==================================================================
    a file              the picture
    a folder            every picture in it and in the folders inside, by ``SUFFIXES``
    a pattern           ``photos/*.jpg``, ``photos/**/*.jpg``
    ``@a`` or ``a.txt``  the files and URLs that it lists, one a line, ``#`` begins a comment;
                        ``@-``: standard input
    ``-``               the picture that comes from standard input
    a URL               http or https, if allowed
    a video file        its frames, by ``VIDEOS``
    ``camera:0``        the frames of the first camera
    ==================  ==================================================================

    Nothing is opened, no file looked at twice, and those in a folder not even once.

    Args:
        sources: what to look for.
        allow_urls: take URLs, too.
        missing: leave files of a list that are not there to ``walk``.

    Returns:
        Names and places, in the order of ``sources``, sorted inside folders and patterns. The
        name is the file's, and inside a folder given its path from there.

    Raises:
        InputError: nothing there, or two pictures would get the same name.
    """
    found: dict[str, str] = {}
    stems: dict[str, str] = {}
    for source in sources:
        for name, place in _look(source, allow_urls, missing):
            stem = os.path.splitext(name)[0]
            if stems.setdefault(stem, place) != place:
                raise InputError(
                    f"{place}: its results would have the name of those of {stems[stem]}: "
                    "predict them into two folders"
                )
            found[name] = place
    for film in [name for name, place in found.items() if _is_video(place)]:
        frame = re.compile(re.escape(os.path.splitext(film)[0]) + r"_\d{6,}")
        if other := next((stem for stem in stems if frame.fullmatch(stem)), None):
            raise InputError(
                f"{found[film]}: the results of a frame would have the name of those of "
                f"{stems[other]}: predict them into two folders"
            )
    return found


def _look(source: str | Path, allow_urls: bool, missing: bool) -> Iterator[tuple[str, str]]:
    """The names and places of one source."""
    text = os.path.normpath(source) if isinstance(source, Path) else source
    if isinstance(source, str):
        if text.startswith("@"):
            yield from _read_list(text[1:], allow_urls, missing)
            return
        if special := _look_elsewhere(text, allow_urls):
            yield special
            return
    mode = _mode(text)
    if mode is None and glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            raise InputError(f"{text}: no pictures there (looking for {' '.join(SUFFIXES)})")
        for match in matches:
            if not stat.S_ISREG(_mode(match) or 0):
                raise InputError(f"{match}: {MISSING}")
            yield _name(match), os.path.normpath(match)
    elif mode is not None and stat.S_ISDIR(mode):
        inside = list(_scan(text, ""))
        if not inside:
            raise InputError(f"{text}: no pictures there (looking for {' '.join(SUFFIXES)})")
        yield from inside
    elif mode is None or not stat.S_ISREG(mode):
        raise InputError(f"{text}: {MISSING}")
    elif text.lower().endswith(".txt"):
        yield from _read_list(text, allow_urls, missing)
    else:
        yield _name(text), os.path.normpath(text)


def _name(path: str) -> str:
    """The file's name; a dot in a video's would end the names of its frames."""
    name = os.path.basename(path)
    stem, suffix = os.path.splitext(name)
    return stem.replace(".", "_") + suffix if _is_video(path) else name


def _look_elsewhere(text: str, allow_urls: bool) -> tuple[str, str] | None:
    """Name and place of what is no file on this machine; None: it is one."""
    if text == "-":
        return "stdin", text
    if _is_url(text):
        if not allow_urls:
            raise InputError(f"{text}: a URL: nothing is fetched without --allow-urls")
        last = unquote(urlsplit(text).path).replace("\\", "/").rpartition("/")[2]
        name = re.sub(r"[\x00-\x1f\x7f]", "_", last).strip(". ")
        return name or "picture", text
    if camera := _CAMERA.fullmatch(text):
        return f"camera{camera[1]}", text
    return None


def _mode(path: str) -> int | None:
    """What is there, by one look; None: nothing."""
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        return None


def _scan(
    folder: str, inside: str, above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, str]]:
    """Pictures of a folder, sorted; what is a folder, the listing itself tells.

    Links are followed, but not to a folder that they lie in, nor twice on one way (``above``).
    """
    try:
        with os.scandir(folder) as listing:
            entries = sorted((e.name, e.is_dir(), e.is_symlink()) for e in listing)
    except OSError as fault:
        raise InputError(f"{folder}: cannot read it: {fault.strerror}") from None
    for name, is_folder, is_link in entries:
        if is_folder:
            place = os.path.join(folder, name)
            way = above
            if is_link:
                target = os.path.realpath(place)
                if target in above or Path(os.path.realpath(folder)).is_relative_to(target):
                    continue
                way = above | {target}
            yield from _scan(place, f"{inside}{name}/", way)
        elif name.lower().endswith(SUFFIXES):
            yield inside + name, os.path.join(folder, name)


def _read_list(file: str, allow_urls: bool, missing: bool) -> Iterator[tuple[str, str]]:
    """The files, videos and URLs that a text file lists: from here, else from where the list is.

    Empty lines are left out, and comments: lines that start with ``#`` and name no file there is.
    """
    if file == "-" and sys.stdin is None:  # closed
        raise InputError("standard input: is closed: give a list there, or name a file")
    try:
        given = sys.stdin.read().removeprefix("\ufeff") if file == "-" else ""
    except UnicodeDecodeError:
        raise InputError("standard input: no text in UTF-8") from None
    lines = given.splitlines() if file == "-" else read_lines(Path(file))
    file = "standard input" if file == "-" else file
    none = True
    for number, line in enumerate(lines, 1):
        if not (text := line.strip()):
            continue
        if special := _look_elsewhere(text, allow_urls):
            none = False
            yield special
            continue
        mode = _mode(text)
        if mode is None and (mode := _mode(beside := os.path.join(os.path.dirname(file), text))):
            text = beside
        if mode is None and text.startswith("#"):
            continue
        none = False
        if not missing and (mode is None or not stat.S_ISREG(mode)):
            raise InputError(f"{file}: line {number}: {text}: {MISSING}")
        yield _name(text), os.path.normpath(text)
    if none:
        raise InputError(f"{file}: lists no picture")


def _is_url(place: str) -> bool:
    return place.lower().startswith(("http://", "https://"))


def _is_video(place: str) -> bool:
    """Whether a place has frames: a video file or a camera."""
    if _CAMERA.fullmatch(place):
        return True
    return place.lower().endswith(VIDEOS) and not _is_url(place)


def count(found: Mapping[str, str], *, every: int = 1, limit: int | None = None) -> int:
    """How many pictures ``walk`` will give; of some videos the number of frames is a guess.

    Raises:
        InputError: a video or a camera, and no OpenCV; a camera without ``limit``.
    """
    total = len(found)
    for place in found.values():
        if _CAMERA.fullmatch(place):
            if limit is None:
                raise InputError(f"{place}: would go on for ever: give --limit, a number of frames")
            _opencv(place)
            return limit
        if _is_video(place):
            film = _open_film(place)
            frames = max(0, int(film.get(_opencv(place).CAP_PROP_FRAME_COUNT))) if film else 1
            total += -(-frames // every) - 1
    return total if limit is None else min(total, limit)


def walk(
    found: Mapping[str, str],
    *,
    every: int = 1,
    limit: int | None = None,
    done: Container[str] = (),
) -> Iterator[Item]:
    """The pictures, in their order.

    Args:
        found: by ``find_pictures``.
        every: of videos and cameras, each so many-th frame, from the first.
        limit: only the first so many pictures, those in ``done`` included.
        done: names to leave out; frames among them are not decoded.
    """
    rest = sys.maxsize if limit is None else limit
    for name, place in found.items():
        if rest <= 0:
            return
        if _is_video(place):
            for item in _frames(name, place, every, rest, done):
                rest -= 1
                if item is not None:
                    yield item
            continue
        rest -= 1
        if name not in done:
            if place == "-":
                read: Callable[[], Pixels] = _read_stdin
            elif _is_url(place):
                read = partial(_read_url, place)
            else:
                read = partial(read_rgb, place)
            yield Item(name, place, read)


def _read_stdin() -> Pixels:
    if sys.stdin is None:  # closed
        raise InputError("standard input: is closed: give a picture there, or name a file")
    content = sys.stdin.buffer.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise InputError(f"standard input: more than {MOST_BYTES >> 20} MB")
    return read_rgb("standard input", content)


def _read_url(url: str) -> Pixels:
    """A picture from the net, kept in memory only.

    Raises:
        InputError: nothing comes, it takes too long, or too much comes; names the URL.
    """
    # Only what is listed can be opened: a redirection to file: or ftp: finds nobody to do it.
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    end = time.monotonic() + DEADLINE
    content = bytearray()
    try:
        asked = request.Request(url, headers={"User-Agent": "brefine"})
        with opener.open(asked, timeout=PATIENCE) as answer:
            while part := answer.read1(2**16):
                content += part
                if len(content) > MOST_BYTES:
                    raise InputError(f"{url}: more than {MOST_BYTES >> 20} MB")
                if time.monotonic() > end:
                    raise InputError(f"{url}: not here after {DEADLINE:.0f} seconds")
    except error.HTTPError as fault:
        raise InputError(f"{url}: cannot fetch it: {fault.code} {fault.reason}") from None
    except InputError:
        raise
    # URLs that are none, and servers that speak no HTTP, give nearly any error.
    except Exception as fault:
        reason = " ".join(str(getattr(fault, "reason", fault)).split())
        raise InputError(f"{url}: cannot fetch it: {reason}") from None
    return read_rgb(url, bytes(content))


def _frames(
    name: str, place: str, every: int, most: int, done: Container[str]
) -> Iterator[Item | None]:
    """Frames of a video or a camera, decoded as they are asked for; None for one in ``done``.

    A broken video is one item, whose reading fails.
    """
    stem = os.path.splitext(name)[0]
    film = _open_film(place)
    number = given = 0
    while film is not None and given < most and film.grab():
        if number % every == 0:
            given += 1
            called = f"{stem}_{number:06}"
            if called in done:
                yield None
            else:
                fine, frame = film.retrieve()
                where = f"{place}: frame {number}"
                yield Item(called, where, partial(_upright, frame if fine else None, where))
        number += 1
    if film is not None and given < most and 0 < number < film.get(FRAMES) - 1:
        # No fault: containers guess, and where a frame is damaged others may follow.
        text = f"{place}: ends after {number} of {film.get(FRAMES):.0f} frames that it should have"
        console.print(text, markup=False, soft_wrap=True)
    if not number and most > 0:
        yield None if name in done else Item(name, place, partial(_upright, None, place))


def _upright(frame: NDArray[np.uint8] | None, place: str) -> Pixels:
    """A frame of OpenCV's, as RGB."""
    if frame is None:
        raise InputError(f"{place}: no video, or of a kind that OpenCV cannot read")
    return as_array(frame, "BGR")


def _opencv(place: str) -> ModuleType:
    try:
        import cv2
    except ImportError:
        raise InputError(f"{place}: frames need OpenCV: pip install 'brefine[video]'") from None
    module: ModuleType = cv2
    return module


def _open_film(place: str) -> Any | None:
    """OpenCV's reader; None: it cannot read this."""
    cv2 = _opencv(place)
    camera = _CAMERA.fullmatch(place)
    film = cv2.VideoCapture(int(camera[1]) if camera else place)
    return film if film.isOpened() else None


def as_array(picture: Held, channels: str = "RGB") -> Pixels:
    """RGB ``[H, W, 3]`` uint8 from a picture in any form.

    Args:
        picture: a file; its content (bytes); a PIL picture; an array ``[H, W, 3]`` uint8, or
            ``[H, W]`` uint8 or uint16, which is grey. The rules of ``data.pictures.to_rgb`` make
            RGB with 8 bits of it.
        channels: the order in arrays, ``RGB`` or ``BGR`` (OpenCV's).

    Raises:
        InputError: no picture, or an array of another shape or type.
    """
    _check_order(channels)
    if isinstance(picture, str | Path):
        return read_rgb(picture)
    if isinstance(picture, bytes):
        return read_rgb("picture", picture)
    if isinstance(picture, Image.Image):
        try:
            return take_rgb(picture, "picture")
        except InputError:
            raise
        except (OSError, ValueError, SyntaxError) as error:  # Pillow reads when asked for pixels
            raise InputError(f"picture: cannot read the picture: {error}") from None
    if not isinstance(picture, np.ndarray):
        raise InputError(
            "picture: expected a file, its bytes, a PIL picture, an array or a tensor, not "
            f"{type(picture).__name__}"
        )
    if picture.ndim == 2 and picture.dtype in (np.uint8, np.uint16) and picture.size:
        return take_rgb(Image.fromarray(picture), "picture")
    known = picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
    if not known or not picture.size:
        grey = " or grey [H, W] uint8 or uint16"
        raise _refuse(picture, f"{channels} [H, W, 3] uint8{grey}", "array")
    pixels = picture if channels == "RGB" else picture[:, :, ::-1]
    # A copy of what may not be written, such as a view of a PIL picture: torch warns of such.
    return np.require(pixels, requirements=["C", "W"])


def as_pixels(picture: Picture, channels: str = "RGB") -> Tensor:
    """RGB ``[3, H, W]`` uint8 from a picture in any form.

    Args:
        picture: as in `as_array`; or a tensor ``[3, H, W]`` or ``[H, W]`` uint8.
        channels: the order in arrays and tensors, ``RGB`` or ``BGR`` (OpenCV's).

    Raises:
        InputError: no picture, or an array of another shape or type.
    """
    import torch

    if not isinstance(picture, torch.Tensor):
        # Left in Pillow's order of bytes, which resizing is fastest with.
        return torch.from_numpy(as_array(picture, channels)).permute(2, 0, 1)
    _check_order(channels)
    pixels = None
    if picture.ndim == 2 and picture.dtype == torch.uint8:
        pixels = picture.cpu().expand(3, -1, -1)
    elif picture.ndim == 3 and picture.shape[0] == 3 and picture.dtype == torch.uint8:
        pixels = picture.cpu()
    if pixels is None or not pixels.numel():
        raise _refuse(picture, f"{channels} [3, H, W] uint8 or grey [H, W] uint8", "tensor")
    return pixels if channels == "RGB" else pixels.flip(0)


def _check_order(channels: str) -> None:
    if channels not in ("RGB", "BGR"):
        raise InputError(f"channels: {channels!r} is none of RGB, BGR")


def _refuse(picture: NDArray[Any] | Tensor, expected: str, kind: str) -> InputError:
    """What to say of an array or a tensor that is no picture."""
    found = f"{kind} {list(picture.shape)} {str(picture.dtype).removeprefix('torch.')}"
    text = f"picture: expected {expected}, not {found}"
    if "float" in text:
        text += ": scale it to 0..255, round it and make it uint8"
    return InputError(text)
