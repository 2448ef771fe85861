"""What a reader does with a fault: refuse the set, or note it and go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from brefine.structures import InputError

Id = int | str | None

#: ``report(kind, file, id, message)``: what is wrong with ``file``. ``message`` is one line that
#: starts with the place inside the file (``line 3: ...``). If the call returns, the reader leaves
#: out the faulty entry and goes on.
Report = Callable[[str, Path, Id, str], None]


def refuse(kind: str, file: Path, id: Id, message: str) -> NoReturn:
    """The ``Report`` of training, evaluation and prediction: the first fault ends the reading.

    Raises:
        InputError: always.
    """
    raise InputError(f"{file}: {message}")
