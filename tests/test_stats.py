"""Figures of a set, counted again from dense masks, and the advice that follows from them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brefine import cli
from brefine.data.coco import CocoSet
from brefine.data.pictures import network_size
from brefine.data.stats import advise, gini, stats
from samples import blob, dense_rle
from test_outlines import components


def make(sizes, objects, classes=3):
    """A set in memory; objects are (picture, label, dense mask, crowd)."""
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": h, "width": w}
            for i, (h, w) in enumerate(sizes)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": picture,
                "category_id": 5 + label,
                "segmentation": dense_rle(mask),
                "iscrowd": int(crowd),
            }
            for number, (picture, label, mask, crowd) in enumerate(objects, 1)
        ],
        "categories": [{"id": 5 + i, "name": f"class {i}"} for i in range(classes)],
    }
    return CocoSet.from_dict(content, Path("labels.json"), Path())


def random_objects(seed, sizes):
    random = np.random.default_rng(seed)
    for picture, size in enumerate(sizes):
        for i in range(random.integers(0, 5)):
            mask = blob(random, size)
            if random.random() < 0.4:  # parts and holes
                mask = mask & (random.random(size) < 0.8)
            if mask.any():
                yield picture, int(random.integers(3)), mask, i > 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(30, 300), st.integers(30, 400))
def test_figures_are_those_of_dense_masks(seed, short, long):
    sizes = [(20, 30), (25, 16), (12, 12), (18, 40)]
    objects = list(random_objects(seed, sizes))
    found = stats(make(sizes, objects), short_side=short, long_side=long)
    mine = [(i, label, mask) for i, label, mask, crowd in objects if not crowd]
    assert found["objects"] == len(mine)
    assert found["crowd_regions"] == len(objects) - len(mine)
    a_picture = [sum(i == picture for i, *_ in mine) for picture in range(4)]
    assert found["objects_a_picture"]["max"] == max(a_picture)
    assert found["objects_a_picture"]["mean"] == pytest.approx(np.mean(a_picture))
    assert found["without_objects"] == a_picture.count(0)
    for entry, label in zip(found["classes"], range(3), strict=True):
        of_class = [i for i, kind, _ in mine if kind == label]
        assert (entry["objects"], entry["pictures"]) == (len(of_class), len(set(of_class)))
        assert (entry["id"], entry["name"]) == (5 + label, f"class {label}")
    if not mine:
        return
    covers = [sum((m.astype(int) for i, _, m in mine if i == p), np.zeros(s, int))
              for p, s in enumerate(sizes)]  # fmt: skip
    twice, once = (sum(int((cover > depth).sum()) for cover in covers) for depth in (1, 0))
    assert found["overlap_of_labelled_pixels"] == pytest.approx(twice / once)

    scales = [network_size(s, short, long)[0] / s[0] for s in sizes]
    sides, borders, parts, holes, roots = [], [], [], [], []
    for _, _, mask in mine:
        ys, xs = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        sides.append(max(np.ptp(ys), np.ptp(xs)) + 1)
        borders.append(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        parts.append(len(components(mask, corners=True)) > 1)
        holes.append(len(components(~np.pad(mask, 1), corners=False)) > 1)
        roots.append(mask.sum() ** 0.5)
    at_network = np.array(sides) * [scales[i] for i, *_ in mine]
    for cells in (14, 28, 56):
        expected = np.mean(at_network / 4 < cells)
        assert found["too_small"][str(cells)] == pytest.approx(expected)
    assert found["at_border"] == pytest.approx(np.mean(borders))
    assert found["several_parts"] == pytest.approx(np.mean(parts))
    assert found["with_holes"] == pytest.approx(np.mean(holes))
    assert found["size"]["p50"] == pytest.approx(np.median(roots))
    assert found["network_size"]["p95"] == pytest.approx(
        np.percentile(np.array(roots) * [scales[i] for i, *_ in mine], 95)
    )


def test_gini():
    """Against the mean difference of all pairs, which defines it."""
    random = np.random.default_rng(0)
    for counts in ([1], [5, 5, 5], [1, 99], random.integers(1, 500, 40)):
        counts = np.array(counts, dtype=float)
        expected = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
        assert gini(counts) == pytest.approx(expected)
    assert gini([]) == 0


def square(size, y, x, side):
    mask = np.zeros(size, dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_advice_follows_the_figures():
    """A good set gets none; each shortcoming gets its own line, with its figure."""
    size = (100, 100)
    good = [(i, i % 2, square(size, 10, 10, 60), False) for i in range(20)]
    assert stats(make([size] * 20, good, classes=2))["advice"] == []

    def advice(objects, sizes=(size,), classes=1, **options):
        return stats(make(list(sizes), objects, classes=classes), **options)["advice"]

    small = [(0, 0, square(size, i, i, 20), False) for i in range(10)]
    (line,) = advice(small, short_side=280)
    assert line.startswith("three quarters of the objects are below 56 pixels at short side 280")
    assert "stages=2" in line
    assert advice(small, short_side=300) == []

    (line,) = advice([(0, 0, square(size, 5, 5, 90), False)] * 20, short_side=40)[1:]
    assert line.startswith("pictures are shrunk 2.5 times")
    (line,) = advice([(0, 0, square(size, 5, 5, 90), False)] * 130)
    assert line.startswith("up to 130 objects a picture")
    lines = advice([(0, 0, square(size, 5, 5, 90), False)] * 60, classes=2)
    assert lines == ["a class has no object: add pictures, or leave it out: class 1"]
    few = [(0, 0, square(size, 5, 5, 90), False)] * 60 + [(1, 1, square(size, 5, 5, 90), False)] * 3
    assert advice(few, sizes=[size] * 2, classes=2)[0] == "a class has few objects: class 1 (3)"
    assert "20 times the objects of the smallest" in advice(few, sizes=[size] * 2, classes=2)[1]
    assert "data.repeat_threshold=0.5" in advice(few, sizes=[size] * 2, classes=2)[1]
    assert (
        "67% of the pictures have no object" in advice(small, sizes=[size] * 3, short_side=1300)[0]
    )
    assert advice([]) == ["there is no object to learn from"]


def test_advice_names_five_classes_and_no_more():
    size = (100, 100)
    objects = [(0, label, square(size, 5, 5, 90), False) for label in range(8)]
    (line,) = stats(make([size], objects, classes=8))["advice"]
    assert line.startswith("8 classes have few objects: class 0 (1), ")
    assert line.endswith("class 4 (1), ...")


def test_a_set_without_pictures_has_figures():
    found = stats(make([], []))
    assert found["pictures"] == found["objects"] == 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_command(toy_set, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    code = cli.main(["data", "stats", str(toy_set / "train.json"), "--short-side", "96", "--json"])
    out, _ = capsys.readouterr()
    assert code == 0
    figures = json.loads(out)
    assert figures["advice"] == advise(figures)
    assert cli.main(["data", "stats", str(toy_set / "train.json"), "--short-side", "96"]) == 0
    out, _ = capsys.readouterr()
    for name in ("star", "cloud", "gear", "leaf", f"{figures['too_small']['28']:.0%}"):
        assert name in out
    for line in figures["advice"]:
        assert line in out


def test_names_are_no_markup(toy_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    content = json.loads((toy_set / "train.json").read_text())
    names = ["cell [dead]", "[bold red]x[/bold]", "[/a]"]
    for category, name in zip(content["categories"], names, strict=False):
        category["name"] = name
    (tmp_path / "train.json").write_text(json.dumps(content))
    arguments = [str(tmp_path / "train.json"), "--images", str(toy_set / "images")]
    assert cli.main(["data", "stats", *arguments]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "none.json: no such"),
        (["{set}/train.json", "--short-side", "0"], "--short-side"),
        (["{set}/train.json", "--images", "none"], "none: no such folder"),
        (["{set}"], "name the COCO json"),
    ],
)
def test_a_mistake_is_one_line(toy_set, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code = cli.main(["data", "stats", *(word.format(set=toy_set) for word in arguments)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_classes_of_one_name_are_counted_apart():
    size = (100, 100)
    found = make([size], [(0, 0, square(size, 5, 5, 90), False)] * 60, classes=2)
    found.categories[1] = found.categories[1]._replace(name=found.categories[0].name)
    assert stats(found)["advice"] == [
        "a class has no object: add pictures, or leave it out: class 0"
    ]
