"""Splits: nothing lost or twice, like shares of every class, groups together, seeded."""

import json
import math
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brefine import cli
from brefine.data.coco import CocoSet
from brefine.data.split import PICTURES, assign, split
from brefine.recipe import Recipe

RECIPES = Path(__file__).parents[1] / "recipes"
SQUARE = [[2, 2, 9, 2, 9, 9, 2, 9]]


def make(folder, pictures, classes=4):
    """A json; ``pictures`` are lists of labels, by name. No picture files: none is opened."""
    found = enumerate(pictures.values())
    objects = [(picture, label) for picture, labels in found for label in labels]
    content = {
        "info": {"year": 2001},
        "images": [
            {"id": 3 * i + 1, "file_name": name, "height": 20, "width": 20, "license": 4}
            for i, name in enumerate(pictures)
        ],
        "annotations": [
            {
                "id": 1000 + i,
                "image_id": 3 * picture + 1,
                "category_id": 10 + label,
                "segmentation": SQUARE,
                "area": 49,
                "bbox": [2, 2, 7, 7],
                "iscrowd": 0,
            }
            for i, (picture, label) in enumerate(objects)
        ],
        "categories": [
            {"id": 10 + i, "name": f"class {i}", "supercategory": "x"} for i in range(classes)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


def random_pictures(seed, count=60, classes=4):
    """Labels by name: long-tailed classes, some pictures empty, some crowded."""
    random = np.random.default_rng(seed)
    chance = 0.5 ** np.arange(classes)
    return {
        f"p{i:03}.png": random.choice(
            classes, random.integers(0, 9), p=chance / chance.sum()
        ).tolist()
        for i in range(count)
    }


def units_of(pictures):
    return {name: Counter({PICTURES: 1}) + Counter(found) for name, found in pictures.items()}


def held(units, chosen, part):
    total = Counter()
    for name, count in units.items():
        if part is None or chosen[name] == part:
            total.update(count)
    return total


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(10, 40), st.sampled_from([0.1, 0.2, 0.5]))
def test_pictures_of_one_class_are_split_to_the_picture(seed, count, val):
    """One object a picture: every class is split as well as whole pictures can be."""
    random = np.random.default_rng(seed)
    units = units_of({f"{i}": [int(random.integers(3))] for i in range(count)})
    chosen = assign(units, [1 - val, val], seed)
    total, mine = held(units, chosen, None), held(units, chosen, 1)
    for kind in (0, 1, 2):
        assert abs(mine[kind] - val * total[kind]) <= 1
    assert abs(mine[PICTURES] - val * count) <= 2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(0.8, 0.2), (0.7, 0.2, 0.1)]))
def test_class_shares_are_nearly_equal(seed, shares):
    """The classes' shares are off by half of what those of random splits are, or less."""
    off, off_random = [], []
    for step in range(5):
        units = units_of(random_pictures(seed + step))
        chosen = assign(units, shares, seed)
        shuffled = np.random.default_rng(seed + step).permutation(len(units)) / len(units)
        ends = np.cumsum(shares)
        by_chance = {
            name: int(min(np.searchsorted(ends, place, "right"), len(shares) - 1))
            for name, place in zip(units, shuffled, strict=True)
        }
        total = held(units, chosen, None)
        for part, share in enumerate(shares):
            for result, found in ((off, chosen), (off_random, by_chance)):
                count = held(units, found, part)
                classes = total.keys() - {PICTURES}
                result += [abs(count[kind] / total[kind] - share) for kind in classes]
            pictures = held(units, chosen, part)[PICTURES]
            assert abs(pictures - share * len(units)) <= 0.05 * len(units)
    assert np.mean(off) < np.mean(off_random) / 2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_moving_any_picture_makes_it_no_better(seed):
    """What the moves leave is a minimum of the sum of (has - due)^2 / due, as promised."""
    shares = [0.7, 0.3]
    units = units_of(random_pictures(seed, count=25))
    chosen = assign(units, shares, seed)
    total = held(units, chosen, None)
    kinds = sorted(total)
    # As in `assign`: a class counts in shares of it, pictures like the root of the classes.
    weight = {kind: 1 / total[kind] for kind in kinds}
    weight[PICTURES] *= math.sqrt(len(kinds) - 1)

    def error(chosen):
        return sum(
            (weight[kind] * (held(units, chosen, part)[kind] - share * total[kind])) ** 2 / share
            for part, share in enumerate(shares)
            for kind in kinds
        )

    best = error(chosen)
    for name in units:
        assert error({**chosen, name: 1 - chosen[name]}) >= best - 1e-9


def test_the_order_of_the_pictures_does_not_matter_but_the_seed_does():
    pictures = random_pictures(3)
    backwards = dict(reversed(pictures.items()))
    chosen = assign(units_of(pictures), [0.8, 0.2], 5)
    assert assign(units_of(backwards), [0.8, 0.2], 5) == chosen
    assert assign(units_of(pictures), [0.8, 0.2], 6) != chosen


def load(folder):
    return {p.stem: json.loads(p.read_text()) for p in folder.iterdir()}


def test_every_picture_and_annotation_is_in_one_part_as_it_was(tmp_path):
    start = make(tmp_path / "s", random_pictures(1))
    before = json.loads(start.read_text())
    split(start, tmp_path / "out", val=0.25, test=0.15, seed=3)
    parts = load(tmp_path / "out")
    assert set(parts) == {"train", "val", "test"}
    for key in ("images", "annotations"):
        both = [entry for part in parts.values() for entry in part[key]]
        assert sorted(both, key=lambda entry: entry["id"]) == before[key]
    for part in parts.values():
        ids = {entry["id"] for entry in part["images"]}
        assert {entry["image_id"] for entry in part["annotations"]} <= ids
        assert part["categories"] == before["categories"]
        assert part["info"] == before["info"]
    for name, share in {"train": 0.6, "val": 0.25, "test": 0.15}.items():
        assert abs(len(parts[name]["images"]) / 60 - share) < 0.05
    assert CocoSet(tmp_path / "out" / "val.json").skipped == []


def test_same_seed_same_bytes(tmp_path):
    start = make(tmp_path / "s", random_pictures(2))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split(start, tmp_path / name, val=0.2, seed=seed)
    a, b, c = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b", "c")
    )
    assert a == b != c


@pytest.mark.parametrize("pattern", [r"^v(\d+)_", r"v\d+", r"^w(\d+)_|^v(\d+)_"])
def test_groups_stay_together(tmp_path, pattern):
    random = np.random.default_rng(0)
    pictures = {
        f"v{video}_{frame}.png": random.integers(0, 4, 3).tolist()
        for video in range(12)
        for frame in range(random.integers(1, 6))
    }
    pictures |= {f"alone{i}.png": [i % 4] for i in range(10)}
    split(make(tmp_path / "s", pictures), tmp_path / "out", val=0.3, group=pattern)
    parts = load(tmp_path / "out")
    names = {part: [e["file_name"] for e in content["images"]] for part, content in parts.items()}
    videos = {
        part: {name.split("_")[0] for name in found if "_" in name} for part, found in names.items()
    }
    assert not videos["train"] & videos["val"]
    assert len(videos["train"] | videos["val"]) == 12
    assert abs(len(names["val"]) / len(pictures) - 0.3) < 0.08
    alone = Counter(part for part, found in names.items() for name in found if "alone" in name)
    assert alone["train"] > 0 < alone["val"]


def test_other_formats_become_coco(tmp_path, toy_set):
    from brefine.data.convert import convert

    convert(toy_set / "train.json", tmp_path / "y", "yolo")
    _, folder = split(tmp_path / "y", tmp_path / "out", val=0.5)
    assert folder == (tmp_path / "y/images").absolute()
    both = [CocoSet(tmp_path / "out" / f"{name}.json", folder) for name in ("train", "val")]
    assert sorted(len(part) for part in both) == [2, 2]
    assert all(picture.file.is_file() for part in both for picture in part.pictures)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    start = make(Path("s"), {**random_pictures(1), "rare.png": [4]}, classes=5)
    code = cli.main(["data", "split", str(start), "out", "--val", "0.2"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert {p.name for p in Path("out").iterdir()} == {"train.json", "val.json"}
    assert "val has no object of: class 4" in out
    folder = tmp_path / "s"
    sets = "--set data.train=out/train.json --set data.val=out/val.json"
    assert out.splitlines()[-1] == f"train with {sets} --set data.images={folder}"


def test_the_last_line_trains(tmp_path, capsys, monkeypatch):
    """Given to a shell as it is, also with a space in a name."""
    monkeypatch.chdir(tmp_path)
    start = make(Path("my set"), random_pictures(1))
    assert cli.main(["data", "split", str(start), "two parts", "--val", "0.2"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("train with "))
    assert words[::2] == ["--set"] * 3
    recipe = Recipe.load(RECIPES / "brefine_lite0.yaml").with_settings(words[1::2])
    assert recipe.data.train == Path("two parts/train.json")
    assert recipe.data.val == Path("two parts/val.json")
    assert recipe.data.images == tmp_path / "my set"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s/labels.json", "out"], "--val"),
        (["s/labels.json", "out", "--val", "0"], "--val 0 --test 0: expected shares"),
        (["s/labels.json", "out", "--val", "1.2"], "expected shares above 0"),
        (["s/labels.json", "out", "--val", "0.5", "--test", "0.5"], "leave some for train"),
        (["s/labels.json", "out", "--val", "nan"], "expected shares above 0"),
        (["s/labels.json", "out", "--val", "0.2", "--group", "("], "no regular expression"),
        (["s/labels.json", "out", "--val", "0.2", "--group", "x9"], "matches no picture, such as"),
        (["s/labels.json", "out", "--val", "0.2", "--group", "p"], "1 groups are too few"),
        (["s/labels.json", "s", "--val", "0.2"], "s: is there already"),
        (["none.json", "out", "--val", "0.2"], "none.json: no such"),
        (["one/labels.json", "out", "--val", "0.2"], "1 pictures are too few"),
        (["s/labels.json", "out", "--val", "0.2", "--seed", "-1"], "--seed"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    make(Path("s"), random_pictures(1))
    make(Path("one"), {"a.png": [0]})
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    code = cli.main(["data", "split", *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


def test_names_stay_as_they_are_written(tmp_path):
    """``images/a.png`` of a json beside ``images`` is still called so, and found, in the parts."""
    path = make(tmp_path / "s", {f"images/{i}.png": [0] for i in range(4)})
    (tmp_path / "s/images").mkdir()
    for i in range(4):
        (tmp_path / f"s/images/{i}.png").touch()
    parts, folder = split(path, tmp_path / "t", val=0.5)
    assert folder == tmp_path / "s"
    names = {image["file_name"] for part in parts.values() for image in part["images"]}
    assert names == {f"images/{i}.png" for i in range(4)}
    assert all(p.file.is_file() for p in CocoSet(tmp_path / "t/val.json", folder).pictures)
