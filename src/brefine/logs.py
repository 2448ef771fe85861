"""What a run writes down on its way: ``metrics.csv``, learning curves, and loggers of others."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from brefine import charts
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


def connect(names: Sequence[str], run: Path) -> list[Logger]:
    """Loggers by the names of a recipe; a resumed run goes on in the same place.

    Raises:
        InputError: the package of one is not installed.
    """
    made: list[Logger] = []
    for name in names:
        try:
            if name == "tensorboard":
                made.append(TensorBoardLogger(run, name="", version="tensorboard"))
            elif name == "wandb":
                key = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
                made.append(WandbLogger(run.name, run, id=key, project="brefine", resume="allow"))
            elif name == "mlflow":  # where MLFLOW_TRACKING_URI says, else in the run folder
                made.append(MLFlowLogger("brefine", run.name, save_dir=str(run / "mlflow")))
        except ModuleNotFoundError:
            raise InputError(
                f"train.loggers: {name} is not installed: pip install 'brefine[{name}]'"
            ) from None
    return made


STYLE = """
:root { color-scheme: light dark; --card: #fff; --rule: #dfe3e8; --ink: #1c2430; --dim: #5a6572; }
@media (prefers-color-scheme: dark) { :root { --card: #171b21; --rule: #2b3037; --ink: #e6e9ee;
  --dim: #9aa3af; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--card); }
"""

#: columns of ``metrics.csv`` that are neither losses nor figures of an evaluation
OTHERS = ("step", "lr")


def draw(table: Path, page: Path) -> None:
    """Learning curves of ``metrics.csv`` as one HTML page: losses, learning rate, AP by step."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in read(table):
        for name, text in row.items():
            if name != "step" and text and math.isfinite(value := float(text)):
                series.setdefault(name, []).append((float(row["step"]), value))
    last = max((points[-1][0] for points in series.values()), default=0.0)
    x = charts.Axis("step", 0.0, max(last, 1.0), percent=False)
    losses = {
        name: points
        for name, points in series.items()
        if not name.startswith(("grad_", "val/", "raw_")) and name not in OTHERS
    }
    aps = {name.removeprefix("val/"): p for name, p in series.items() if name.startswith("val/")}
    parts = []
    for title, note, drawn, percent in (
        ("Loss", "Of single batches: it jumps.", {"loss": losses.pop("loss", [])}, False),
        ("Parts of the loss", "Their sum is minimised.", losses, False),
        ("AP", "Of the validation set, in percent.", aps, True),
        ("Learning rate", "Of the heads.", {"lr": series.get("lr", [])}, False),
    ):
        values = [value for points in drawn.values() for _, value in points]
        if not values:
            continue
        high = 1.0 if percent else max(values) * 1.05 or 1.0
        y = charts.Axis(title, min(0.0, *values), high, percent=percent)
        styles = [f"c{i % 5}{' dash' if i > 4 else ''}" for i in range(len(drawn))]
        lines = [
            charts.Line(name, points, style, dots=percent)
            for (name, points), style in zip(drawn.items(), styles, strict=True)
        ]
        parts.append(charts.lines(title, note, x, y, lines))
    with replacing(page) as aside:
        aside.write_text(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Learning curves'
            f"</title><style>{STYLE}{charts.STYLE}</style></head><body>"
            f'<div class="charts">{"".join(parts)}</div></body></html>',
            encoding="utf-8",
        )
