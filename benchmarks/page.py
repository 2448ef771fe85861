"""Results that benchmarks keep, and the tables that they put into a page from them."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision

from brefine.files import replacing

END = "<!-- end -->"


def begin(benchmark: str) -> str:
    """The line that the tables of a benchmark follow; they end at ``END``."""
    return f"<!-- made by benchmarks/{benchmark}.py -->\n"


def read_results(path: Path) -> dict[str, Any]:
    """What an earlier run has left, maybe nothing."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def write_results(path: Path, results: dict[str, Any]) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(results, indent=1) + "\n")


def write_tables(page: Path, benchmark: str, tables: str) -> None:
    """Put tables in the place of the last ones of this benchmark."""
    text = page.read_text()
    start = begin(benchmark)
    if start not in text or END not in text.partition(start)[2]:
        raise SystemExit(f"{page}: lacks the lines {start.strip()} and {END} for the tables")
    before, _, rest = text.partition(start)
    with replacing(page) as aside:
        aside.write_text(before + start + tables + rest[rest.index(END) :])


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first stand at the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def describe_machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"processor": name, "instructions": instructions, "cores": os.cpu_count(), **versions}


def print_machine(machine: dict[str, Any]) -> str:
    """One line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items()) + ".\n\n"
