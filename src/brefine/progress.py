"""Progress with an ETA: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

T = TypeVar("T")

#: everything people read goes to stderr, so that stdout can be piped
console = Console(stderr=True, highlight=False)


class Progress:
    """Counts up to ``total`` and says how long the rest will take.

    Args:
        title: a word or two in front.
        total: how many steps there are.
        every: seconds between two lines where there is no terminal.
    """

    def __init__(self, title: str, total: int, *, every: float = 10.0) -> None:
        self.title, self.total, self.every = title, total, every
        self.done, self.start = 0, time.monotonic()
        self.last = self.start
        self.bar: RichProgress | None = None
        if console.is_terminal:
            self.bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task(title, total=total, figures="")

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, count: int = 1, figures: str = "") -> None:
        """``count`` steps are done; ``figures`` (losses and the like) stand beside the bar."""
        self.done += count
        if self.bar:
            self.bar.update(self.task, advance=count, figures=figures)
            return
        now = time.monotonic()
        if now - self.last >= self.every or self.done == self.total:
            self.last = now
            elapsed = now - self.start
            rest = elapsed / self.done * (self.total - self.done) if self.done else 0.0
            console.print(
                f"{self.title} {self.done}/{self.total}  {figures}  "
                f"{clock(elapsed)} elapsed, ETA {clock(rest)}",
                markup=False,
                soft_wrap=True,
            )


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """The items one by one, with progress."""
    with Progress(title, total) as progress:
        for item in items:
            yield item
            progress.advance()


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
