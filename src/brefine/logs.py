"""What a run writes down on its way: ``metrics.csv``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from brefine.files import replacing
from brefine.structures import InputError


class Table(Logger):
    """``metrics.csv``: one row a call, one column a name, written at once.

    Lightning's own begins anew when a run is resumed; this one goes on.

    Args:
        path: the file.
    """

    name = "table"
    version = 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.names = list(rows[0]) if (rows := read(path)) else []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Are in the recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row.

        Raises:
            InputError: the disk is full.
        """
        row = {"step": step, **metrics}
        new = [name for name in row if name not in self.names]
        if new:
            rows = read(self.path)
            self.names = sorted({*self.names, *new} - {"step"})
            self.names.insert(0, "step")
            self._write([*rows, row])
            return
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.names).writerow(row)
        except OSError as error:
            raise InputError(f"{self.path}: cannot write: {error.strerror or error}") from None

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows of this step and later ones: a resumed run writes them again."""
        rows = read(self.path)
        kept = [row for row in rows if row["step"].isdigit() and int(row["step"]) < step]
        if len(kept) < len(rows):
            self._write(kept)

    def _write(self, rows: list[Any]) -> None:
        with replacing(self.path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.names)
            writer.writeheader()
            writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv``, without a last one that was cut short; none without a file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [row for row in csv.DictReader(lines) if None not in row.values()]
