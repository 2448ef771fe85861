"""What there is to predict: files, folders and patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from brefine.data.pictures import SUFFIXES
from brefine.structures import InputError


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
