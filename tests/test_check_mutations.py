"""Whatever is in a set: check and reading never fail otherwise than in words, and always agree."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brefine.data.coco import CocoSet
from brefine.data.read import read
from brefine.data.toy import draw
from brefine.structures import InputError
from test_check_formats import NAMES, SKIPPED, find, read_all, write, write_labelme, write_yolo

#: kinds that make CocoSet refuse the whole json, those that cost one annotation, and those that
#: no json by itself can show
FATAL = {
    "bad-json", "missing-key", "wrong-type", "bad-size", "duplicate-category-id",
    "duplicate-picture-id",
}  # fmt: skip
UNUSABLE = {
    "unknown-picture", "unknown-category", "no-mask", "bad-crowd", "bad-polygon", "few-points",
    "bad-rle", "empty-mask", "outside-mask",
}  # fmt: skip
BEYOND = {
    "missing-picture", "unreadable-picture", "wrong-size", "swapped-size", "no-objects",
    "shifted-ids",
}  # fmt: skip

SQUARE = [10.0, 8.0, 30.0, 8.0, 30.0, 28.0, 10.0, 28.0]
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 100),
    st.sampled_from([10**400, -(2**70), 1e300, math.nan, math.inf, -math.inf, -1, 0, 1.0, 2.5]),
    st.text(max_size=3),
    st.sampled_from([[], {}, [[]], {"": []}, "a\0", "\ud800", [[0, 0, 1e5, 1e5, 3, 9]]]),
    st.sampled_from([SQUARE, [SQUARE], [[3, 3], [9, 9]], {"size": [64, 80], "counts": [5120]}]),
    st.sampled_from([{"image_id": 1, "segmentation": [SQUARE]}, "circle", "rectangle"]),
    st.lists(st.floats(), max_size=8),
)
#: which value, what to do with it, which other value, what to put there
mutation = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from(["drop", "replace", "reverse", "swap", "double", "negate", "wrap"]),
    st.integers(0, 10**6),
    junk,
)


def walk(value: object) -> Iterator[tuple[object, object]]:
    """Every place inside a json value, as a container and a key."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from walk(value[key])


def mutate(value: dict, changes: list) -> None:
    """Change values anywhere in a json, those of few places as often as those of many."""
    for number, operation, second, new in changes:
        places = list(walk(value))
        if not places:
            return
        # Every other change is near the top, where it breaks most.
        near = places if number % 2 else [p for p in places if not isinstance(p[0][p[1]], float)]
        holder, key = (near or places)[number // 2 % len(near or places)]
        other, place = places[second % len(places)]
        old = holder[key]
        if operation == "drop":
            del holder[key]
        elif operation == "reverse" and isinstance(old, list):
            old.reverse()
        elif operation == "swap":
            moved, back = copy.deepcopy(other[place]), copy.deepcopy(old)
            other[place] = back
            holder[key] = moved
        elif operation == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(old))
        elif operation == "negate" and isinstance(old, int | float):
            holder[key] = -old
        elif operation == "wrap":
            holder[key] = [old]
        else:
            holder[key] = copy.deepcopy(new)


# ------------------------------------------------------------------------------------------ COCO


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder with pictures, and a json with 4 of them and 6 objects."""
    folder = tmp_path_factory.mktemp("toy") / "set"
    draw(folder, train=4, val=1, size=(64, 80), seed=3, progress=False)
    content = json.loads((folder / "train.json").read_text())
    content["annotations"] = content["annotations"][:6]
    rle = CocoSet(folder / "train.json").ground_truth()["annotations"][0]["segmentation"]
    content["annotations"][0]["segmentation"] = rle
    return folder, content


def agree(path: Path, content: dict) -> None:
    """What ``check`` says of a COCO json is what ``CocoSet`` does, both ways."""
    faults = find(path)
    kinds = {fault.kind for fault in faults if fault.severity == "error"}
    try:
        dataset, line = CocoSet(path), ""
    except InputError as error:
        dataset, line = None, str(error)
    if dataset is None:
        assert line.startswith(str(path))
        assert "\n" not in line
        assert kinds & FATAL
        return
    assert kinds <= UNUSABLE | BEYOND
    unusable = [fault for fault in faults if fault.kind in UNUSABLE]
    # Every annotation is taken, or skipped with a line.
    taken = sum(len(dataset.annotations(index)) for index in range(len(dataset)))
    assert taken + len(dataset.skipped) == len(content["annotations"])
    assert bool(unusable) == bool(dataset.skipped)
    assert {f.message.split(": ")[0] for f in unusable} == {
        line.split(": ")[0] for line in dataset.skipped
    }
    # What is taken becomes an object, but crowd regions and what is too thin to hold a pixel.
    objects = sum(len(dataset.target(index)) for index in range(len(dataset)))
    slivers = sum(fault.kind == "sliver" for fault in faults)
    crowd = sum(
        bool(entry.get("iscrowd"))
        for index in range(len(dataset))
        for entry in dataset.annotations(index)
    )
    assert taken - crowd - slivers <= objects <= taken - crowd
    assert (objects == 0) == ("no-objects" in kinds)


@settings(deadline=None, max_examples=120)
@given(st.lists(mutation, min_size=1, max_size=4))
def test_any_coco_json_is_checked_as_it_is_read(toy: tuple[Path, dict], changes: list) -> None:
    folder, content = toy
    values = copy.deepcopy(content)
    mutate(values, changes)
    write(folder / "broken.json", json.dumps(values))
    agree(folder / "broken.json", values)


KEYS = {
    "images": ["id", "file_name", "height", "width"],
    "annotations": ["id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd"],
    "categories": ["id", "name"],
}
#: a value that matters is dropped or replaced
change = st.sampled_from(sorted(KEYS)).flatmap(
    lambda key: st.tuples(
        st.just(key),
        st.integers(0, 3),
        st.sampled_from([None, *KEYS[key]]),
        st.none() | junk.map(lambda value: [value]),
    )
)


@settings(deadline=None, max_examples=100)
@given(st.lists(change, max_size=4), st.randoms(use_true_random=False))
def test_any_values_of_a_coco_json(toy: tuple[Path, dict], changes: list, random: object) -> None:
    folder, content = toy
    values = copy.deepcopy(content)
    for key, number, name, new in changes:
        entries = values[key]
        if name is None:
            entries[number:] = new if new is not None else []
        elif number < len(entries) and isinstance(entries[number], dict):
            entries[number].pop(name, None)
            if new is not None:
                entries[number][name] = copy.deepcopy(new[0])
    for key in KEYS:
        random.shuffle(values[key])  # type: ignore[attr-defined]
    write(folder / "broken.json", json.dumps(values))
    agree(folder / "broken.json", values)


# ---------------------------------------------------------------------------------------- others


@pytest.fixture(scope="module")
def yolo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_yolo(tmp_path_factory.mktemp("yolo"))


word = st.one_of(
    st.floats(-0.2, 1.2).map(str),
    st.sampled_from([0, 1, 2, 5, 0.5, "nan", "-inf", "1e999", "1e-400", "-0", "1_0", "0x1"]).map(
        str
    ),
    st.integers(-3, 10**30).map(str),
    st.text(max_size=4),
)
sound = st.lists(st.floats(0, 1).map(str), min_size=6, max_size=12).map(
    lambda words: " ".join(["1", *words[: len(words) // 2 * 2]])
)


@settings(deadline=None, max_examples=80)
@given(st.lists(sound | st.lists(word, max_size=9).map(" ".join), max_size=4))
def test_any_yolo_lines_are_checked_as_they_are_read(yolo: Path, lines: list[str]) -> None:
    text = "\n".join(lines)
    file = yolo.parent / "labels/train/a.txt"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    faults = find(yolo)
    outcome = read_all(yolo, faults)
    said = {fault.id for fault in faults if fault.file == str(file)}
    # read as ``read_lines`` does: line ends are made one, a mark at the start is dropped
    full = file.read_text("utf-8-sig").splitlines() if "bad-label-file" not in str(faults) else []
    numbers = {number for number, row in enumerate(full, 1) if row.strip()}
    assert said <= numbers | {None}
    if outcome != "refused":
        dataset = read(yolo, split="train", quiet=True)
        assert len(dataset.annotations(0)) + len(dataset.skipped) == len(numbers)
        errors = [f for f in faults if f.severity == "error"]
        assert {f.id for f in errors} == {int(row.split()[2]) for row in dataset.skipped}
        assert {f.kind for f in errors} <= SKIPPED


@pytest.fixture(scope="module")
def labelme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelme(tmp_path_factory.mktemp("labelme"))


@settings(deadline=None, max_examples=100)
@given(st.lists(mutation, min_size=1, max_size=3))
def test_any_labelme_json_is_checked_as_it_is_read(labelme: Path, changes: list) -> None:
    original = (labelme / "a.json").read_text()
    content = json.loads(original)
    mutate(content, changes)
    try:
        write(labelme / "a.json", json.dumps(content))
        outcome = read_all(labelme, find(labelme))
        if outcome == "refused":
            return
        dataset = read(labelme, quiet=True)
        mine = [
            i for i, picture in enumerate(dataset.pictures) if picture.id not in ("b.png", "c.png")
        ]
        shapes = content["shapes"]
        objects = {
            number if shape.get("group_id") is None else (shape["label"].strip(), shape["group_id"])
            for number, shape in enumerate(shapes)
        }
        taken = sum(len(dataset.annotations(index)) for index in mine)
        assert taken + len(dataset.skipped) == len(objects)
        assert len(dataset) == len(NAMES)
    finally:
        write(labelme / "a.json", original)
