"""Writing files so that nothing half-written is ever in place of something good."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from brefine.structures import InputError


def require_empty(folder: Path) -> None:
    """Make sure that writing ``folder`` replaces nothing.

    Raises:
        InputError: it has content, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already: give a new folder or remove it")


def check_target(option: str, path: Path, suffix: str, mark: str, inputs: Iterable[Path]) -> None:
    """Make sure that a file named on the command line may be written.

    Args:
        option: that names it, for the message.
        path: what it names.
        suffix: that it must have.
        mark: how a file begins that this command wrote earlier (a regular expression); only such
            a file is replaced.
        inputs: of the command, which are no place to write to.

    Raises:
        InputError: it may not.
    """
    if path.suffix.lower() != suffix or path.is_dir():
        raise InputError(f"{option} {path}: name a file that ends in {suffix}")
    if any(path.resolve() == Path(each).resolve() for each in inputs):
        raise InputError(f"{option} {path}: is what is to be read: name another file")
    if path.exists():
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                ours = re.match(mark, file.read(4096))
        except OSError as error:
            raise InputError(f"{option} {path}: cannot write: {error.strerror}") from None
        if not ours:
            raise InputError(
                f"{option} {path}: is there already, and not from this command: name another file"
            )


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A path aside to write a file or a folder to; moved to ``path`` when the block ends well.

    Until then whatever is at ``path`` stays as it is, and it stays for good when the block
    raises; what was written aside is then removed.

    Args:
        path: the file or folder to write; of a link, what it leads to. Missing parents are made.

    Raises:
        InputError: the place cannot be written to (permission, a file in the way, disk full).
    """
    path = follow(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        put(aside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(OSError):  # a file may stand where a parent should be
                aside.unlink()


def follow(path: Path | str) -> Path:
    """Where a link leads to, whether that is there or not; a path that is none as it is.

    One without a name of its own (``.``, ``..``) becomes absolute.
    """
    if os.path.islink(path):
        return Path(os.path.realpath(path))
    return Path(os.path.abspath(path)) if Path(path).name in ("", "..") else Path(path)


def put(aside: Path, path: Path) -> None:
    """Move a file or a folder to a path beside it, in place of what is there.

    Raises:
        OSError: that cannot be done; then both stay.
    """
    if aside.is_dir() and path.is_dir() and path.samefile(os.curdir) and not any(path.iterdir()):
        for each in aside.iterdir():  # who works in the folder stays in it
            os.replace(each, path / each.name)
    elif aside.is_dir() and path.is_dir():
        # A folder cannot replace a folder that has content: the old one steps aside first.
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.replace(path, old)
        os.replace(aside, path)
        shutil.rmtree(old)
    else:
        os.replace(aside, path)
