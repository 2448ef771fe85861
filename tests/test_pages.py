"""What the pages show is what the stored results say."""

import importlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("benchmarks", "benchmarks/quality"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def stored(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["speed", "train_step", "peers"])
def test_tables_of_speed(script: Any, name: str) -> None:
    assert script(name).tables(stored(name)) in page("speed.md")


def test_table_of_exports(script: Any) -> None:
    assert script("export").make_table(stored("export")) in page("export.md")


def test_tables_of_heads(script: Any) -> None:
    heads, results = script("heads"), stored("heads")
    assert heads.table(results) in page("speed.md")
    assert heads.parts_table(results) in page("quality.md")
    assert heads.draw(results) == page("images/heads.svg")


def test_tables_of_the_study(script: Any) -> None:
    table = script("table")
    results = table.load(ROOT / "benchmarks/quality/results/small")
    assert table.tables(results) in page("quality.md")
    assert table.draw(results) == page("images/quality.svg")


def test_table_of_the_preset(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune = script("finetune")
    copy = tmp_path / "finetune.md"
    copy.write_text(page("finetune.md"), encoding="utf-8")
    monkeypatch.setattr(finetune, "DOCS", copy)
    found = sorted(finetune.RESULTS.glob("*.json"))
    finetune.write_table([json.loads(path.read_text(encoding="utf-8")) for path in found])
    assert copy.read_text(encoding="utf-8") == page("finetune.md")


def test_methods_changed_alike_stand_side_by_side(script: Any) -> None:
    table = script("table")
    results = table.load(ROOT / "benchmarks/quality/results/small")
    both = [
        results[table.Cell("toy", f"{method}_lr_double", 0)]["values"]["mask/AP"]
        for method in ("brefine", "mask_rcnn")
    ]
    (row,) = [r for r in table.changed_alike(results, "toy").splitlines() if "lr=0.002" in r]
    assert row.startswith(f"| train.lr=0.002 | 1 | {100 * (both[0] - both[1]):+.1f} |")
    assert not table.changed_alike({}, "toy")


def test_the_study_in_the_readme(script: Any) -> None:
    """Rows such as ``| nuclei (BBBC038) | BRefine, 3 | 49.7 | ... |``."""
    table = script("table")
    results = table.load(ROOT / "benchmarks/quality/results/small")
    variants = {"Mask R-CNN": "mask_rcnn", "BRefine": "brefine"}
    keys = ["mask/AP", "boundary/AP", "box/AP", "given_boxes/mask_iou", "given_boxes/boundary_iou"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (nuclei|toy|person|object)\b[^|]*\| ([\w -]+), (\d+) \|(.*)\|$", text, re.MULTILINE
    )
    assert len(rows) == 8
    for name, title, seeds, figures in rows:
        runs = [
            run
            for cell, run in results.items()
            if (cell.set, cell.variant) == (name, variants[title])
        ]
        assert len(runs) == int(seeds)
        printed = figures.replace("*", "").split("|")
        for key, value in zip(keys, printed, strict=False):
            mean = 100 * statistics.fmean(run["values"][key] for run in runs)
            assert value.strip() == f"{mean:.1f}", (name, title, key)
