"""benchmarks/quality/heads.py: heads are built, really learn, tiny, and fill both pages."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from brefine.data import toy
from brefine.methods.brefine import FusionMaskHead


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with a tiny set, trunk and pages of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks/quality"))
    module = importlib.import_module("heads")
    draw = toy.draw
    monkeypatch.setattr(module.torch, "set_num_threads", lambda _: None)  # as conftest has it
    monkeypatch.setattr(
        module.toy, "draw", lambda place, **_: draw(place, train=3, val=2, seed=0, size=(64, 96))
    )
    monkeypatch.setattr(module.pretrained, "start", lambda *_: None)
    base = {"backbone": "lcnet_035", "channels": 16, "detector": {"box_hidden": 32}}
    monkeypatch.setattr(module, "BASE", base)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "docs/images").mkdir(parents=True)
    for page in ("speed", "quality"):
        begin, end = module.MARKERS
        (tmp_path / f"docs/{page}.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    return module


def test_a_part_is_the_full_head_with_one_change(heads: Any) -> None:
    for name, (method, more) in heads.PARTS.items():
        assert method == "brefine"
        assert len(more) == 1
        assert isinstance(heads.build(name, 4).mask_head, FusionMaskHead)
    assert not set(heads.HEADS) & set(heads.PARTS)
    assert set(heads.WHOLE) <= set(heads.HEADS)


def test_heads_learn_once_and_fill_their_pages(
    heads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads_to_time = {name: heads.HEADS[name] for name in heads.WHOLE}
    monkeypatch.setattr(heads, "HEADS", heads_to_time)
    results = tmp_path / "results.json"
    only = ["Mask R-CNN", "full", "1 stage (14 x 14)"]
    arguments = ["heads.py", "--steps", "2", "--results", str(results), "--only", *only]
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "0", "1"])
    heads.main()
    found = json.loads(results.read_text())
    assert set(found["runs"]) == {f"toy/{head}/2/{seed}" for head in only for seed in (0, 1)}
    assert set(found["milliseconds"]) == set(heads.WHOLE)
    pages = {page: (tmp_path / f"docs/{page}.md").read_text() for page in ("speed", "quality")}
    for text in pages.values():
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
    named = {
        page: [row.split(" | ") for row in text.splitlines() if row.startswith("| ")][2:]
        for page, text in pages.items()
    }
    assert [row[0] for row in named["speed"]] == ["| Mask R-CNN", "| full"]
    assert [row[:3] for row in named["quality"]] == [["| toy", head, "2"] for head in only]
    value = [found["runs"][f"toy/full/2/{s}"]["given_boxes/boundary_iou"] for s in (0, 1)]
    mean, low, high = (100 * each for each in (sum(value) / 2, min(value), max(value)))
    assert named["quality"][1][3] == f"{mean:.1f} ({low:.1f} to {high:.1f})"
    assert named["speed"][1][2] == named["quality"][1][3]
    picture = (tmp_path / "docs/images/heads.svg").read_text()
    assert picture.count("<circle") == 2
    monkeypatch.setattr(heads, "learn", None)  # what is there is not made again
    monkeypatch.setattr(heads, "time_heads", lambda: found["milliseconds"])
    heads.main()
    assert json.loads(results.read_text()) == found
