"""benchmarks/quality/finetune.py: three variants, really run, tiny, and their table."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from brefine.data.toy import draw
from brefine.recipe import Recipe
from test_finetune import TINY_SETTINGS


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with a page and settings of a tiny run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks/quality"))
    module = importlib.import_module("finetune")
    monkeypatch.setattr(module.torch, "set_num_threads", lambda _: None)  # as conftest has it
    preset, with_settings = module.finetune, Recipe.with_settings
    module.pasted = {}

    def tiny_preset(data: Path, out: Path, *, settings: list[str], **others: Any) -> Path:
        model: Path = preset(data, out, settings=settings + tiny, **others)
        module.pasted[out.name] = Recipe.load(out / "recipe.yaml").data.copy_paste
        return model

    monkeypatch.setattr(module, "finetune", tiny_preset)
    tiny = [*TINY_SETTINGS, "train.steps=2"]
    monkeypatch.setattr(
        Recipe, "with_settings", lambda self, settings: with_settings(self, [*settings, *tiny])
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- finetune: begin -->\n<!-- finetune: end -->\nafter\n")
    monkeypatch.setattr(module, "DOCS", page)
    return module


def test_variants_run_and_stand_in_the_table(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    draw(folder, train=8, val=2, seed=0, size=(64, 96))
    arguments = ["finetune.py", "--data", str(folder / "train.json"), "--counts", "6"]
    arguments += ["--test", str(folder / "val.json"), "--work", str(tmp_path / "work")]
    arguments += ["--results", str(tmp_path / "results")]
    arguments += ["--only", "copy_paste", "preset", "defaults"]
    monkeypatch.setattr("sys.argv", arguments)
    benchmark_module.main()
    rows = benchmark_module.DOCS.read_text().splitlines()
    assert rows[0] == "before"
    assert rows[-1] == "after"
    assert [row.split(" | ")[:3] for row in rows if row.startswith("| set")][1:] == [
        ["| set", "6", "defaults"],
        ["| set", "6", "preset"],
        ["| set", "6", "preset, `copy_paste=0.5`"],
    ]
    cells = {row.split(" | ")[2]: row.split(" | ") for row in rows if row.startswith("| set")}
    stored = {
        name: json.loads((tmp_path / f"results/set-6-{name}-0.json").read_text())["values"]
        for name in ("defaults", "preset")
    }
    at = cells[""].index("mask AP to the preset's")
    points = 100 * (stored["defaults"]["mask/AP"] - stored["preset"]["mask/AP"])
    assert cells["defaults"][at] == f"{points:+.1f}"
    assert cells["preset"][at] == "-"
    assert benchmark_module.pasted == {"set-6-copy_paste-0": 0.5, "set-6-preset-0": 0.0}
    assert not [place for place in (tmp_path / "work").iterdir() if place.is_dir()]
    found = json.loads((tmp_path / "results/set-6-preset-0.json").read_text())
    assert found["steps"] == 2
    assert found["test_pictures"] == 2
    times = [file.stat().st_mtime_ns for file in sorted((tmp_path / "results").iterdir())]
    assert len(times) == 3
    benchmark_module.main()  # nothing is run again
    assert [f.stat().st_mtime_ns for f in sorted((tmp_path / "results").iterdir())] == times
