"""Broken sets of every kind, each with what must be said of it and nothing else."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from brefine import cli
from brefine.data.check import check
from brefine.data.coco import CocoSet
from brefine.data.faults import KINDS, exit_code, summarise
from brefine.data.geometry import find_crossing
from brefine.data.toy import draw
from brefine.structures import InputError

HEIGHT, WIDTH = SIZE = 64, 80
SQUARE = [10.0, 8.0, 30.0, 8.0, 30.0, 28.0, 10.0, 28.0]

#: kinds that make CocoSet refuse the whole json, and one annotation
FATAL = {
    "bad-json", "missing-key", "wrong-type", "bad-size", "duplicate-category-id",
    "duplicate-picture-id",
}  # fmt: skip
UNUSABLE = {
    "unknown-picture", "unknown-category", "no-mask", "bad-crowd", "bad-polygon", "few-points",
    "bad-rle", "empty-mask", "outside-mask",
}  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy set with at least 10 objects of each class in train."""
    folder = tmp_path_factory.mktemp("clean") / "set"
    draw(folder, train=20, val=4, size=SIZE, seed=3, progress=False)
    return folder


@pytest.fixture(scope="module")
def content(clean: Path) -> dict:
    return json.loads((clean / "train.json").read_text())


@pytest.fixture
def place(clean: Path, tmp_path: Path) -> Path:
    """A copy of the set to break pictures in."""
    return Path(shutil.copytree(clean, tmp_path / "set"))


def find(path: Path, values: object, **options) -> list:
    file = path / "broken.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    return check(file, progress=False, **options)


def pairs(faults: list) -> list[tuple[str, object]]:
    for fault in faults:
        assert fault.message == " ".join(fault.message.split())
        assert (fault.severity, fault.advice) == KINDS[fault.kind]
    return [(fault.kind, fault.id) for fault in faults]


def rle(counts: object, size: object = SIZE) -> dict:
    return {"size": list(size), "counts": counts}  # type: ignore[call-overload]


@pytest.mark.parametrize(("picture", "said"), [(99999, "99999"), ("1", "'1'")])
def test_an_unknown_picture_is_shown_as_number_or_text(
    clean: Path, content: dict, picture: object, said: str
) -> None:
    note = {**content["annotations"][0], "id": 9001, "image_id": picture}
    faults = find(clean, {**content, "annotations": [*content["annotations"], note]})
    assert pairs(faults) == [("unknown-picture", 9001)]
    assert faults[0].message == f"annotation 9001: unknown image_id {said}"


# --------------------------------------------------------------------------- one annotation more

#: what is wrong with annotation 9001, and what is said of it
ANNOTATIONS: list[tuple[dict, list[str]]] = [
    ({}, []),
    ({"bbox": [10.4, 8.2, 19.3, 19.9], "area": 399.7}, []),
    ({"bbox": None, "area": None}, []),
    ({"segmentation": [[-1.5, 8, 30, 8, 30, 28, -1.5, 28]]}, []),  # rounding at the frame
    ({"segmentation": rle([64 * 10, 64 * 5, 64 * 65]), "iscrowd": 1}, []),
    # two squares, joined by a bridge of no width across a side of the first
    (
        {
            "segmentation": [
                [0, 0, 30, 0, 30, 30, 0, 30, 0, 0, 50, 20, 60, 20, 60, 40, 50, 40, 50, 20]
            ]
        },
        [],
    ),
    # polygons
    ({"segmentation": None}, ["no-mask"]),
    ({"segmentation": []}, ["no-mask"]),
    ({"segmentation": [[]]}, ["few-points"]),
    ({"segmentation": [[1, 2, 3, 4]]}, ["few-points"]),
    ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, ["bad-polygon"]),
    ({"segmentation": SQUARE}, ["bad-polygon"]),
    ({"segmentation": [[1, 2, "x", 4, 5, 6]]}, ["bad-polygon"]),
    ({"segmentation": [[1, 2, math.nan, 4, 5, 6]]}, ["bad-polygon"]),
    ({"segmentation": [[1, 2, math.inf, 4, 5, 6]]}, ["bad-polygon"]),
    ({"segmentation": "polygon"}, ["bad-polygon"]),
    ({"segmentation": [[1, 2, 1e9, 4, 5, 6]]}, ["outside-mask"]),
    ({"segmentation": [[-9, -9, -5, -9, -5, -4]]}, ["outside-mask"]),
    ({"segmentation": [[90, 5, 99, 5, 99, 9]]}, ["outside-mask"]),
    ({"segmentation": [[5, 5, 5, 5, 5, 5]]}, ["empty-mask"]),
    ({"segmentation": [[5, 5, 9, 5, 20, 5]]}, ["empty-mask"]),
    ({"segmentation": [[0, 0.02, 70, 0.02, 72, 0.3, 0, 0.2]]}, ["sliver"]),
    ({"segmentation": [SQUARE, [3, 3, 4, 4]]}, ["empty-part"]),
    ({"segmentation": [SQUARE, [40, 40, 50, 40, 45, 40]]}, ["empty-part"]),
    ({"segmentation": [[10, 8, 30, 28, 30, 8, 10, 28]]}, ["self-crossing"]),
    ({"segmentation": [SQUARE, [40, 10, 60, 30, 60, 10, 40, 30]]}, ["self-crossing"]),
    ({"segmentation": [[60, 8, 95, 8, 95, 28, 60, 28]]}, ["clipped-mask"]),
    ({"segmentation": [SQUARE], "iscrowd": 1}, ["crowd-polygons"]),
    ({"iscrowd": 2}, ["bad-crowd"]),
    ({"iscrowd": "no"}, ["bad-crowd"]),
    ({"iscrowd": None}, ["bad-crowd"]),
    # RLE
    ({"segmentation": rle([1, 2])}, ["bad-rle"]),
    ({"segmentation": rle([-1, 64 * 80 + 1])}, ["bad-rle"]),
    ({"segmentation": rle([10**30])}, ["bad-rle"]),
    ({"segmentation": rle([1.5, 3])}, ["bad-rle"]),
    ({"segmentation": rle("oooo")}, ["bad-rle"]),
    ({"segmentation": rle("\u00e9\udcff")}, ["bad-rle"]),
    ({"segmentation": rle([64 * 10, 64 * 70], (80, 64))}, ["bad-rle"]),
    ({"segmentation": {"size": [64, 80]}}, ["bad-rle"]),
    ({"segmentation": {"counts": [5120]}}, ["bad-rle"]),
    ({"segmentation": rle([64 * 80])}, ["empty-mask"]),
    # boxes and areas
    ({"bbox": [10, 8, 30, 28]}, ["corner-box"]),
    ({"bbox": [11, 9, 29, 29]}, ["corner-box"]),
    ({"bbox": [40, 30, 20, 20]}, ["box-mismatch"]),
    ({"bbox": [10, 8, 20, 40]}, ["box-mismatch"]),
    ({"bbox": [10, 8, 0, 20]}, ["empty-box"]),
    ({"bbox": [10, 8, 20, -20]}, ["empty-box"]),
    ({"bbox": [0, 0, 0, 0]}, ["empty-box"]),
    ({"bbox": [10, 8, 20]}, ["bad-box"]),
    ({"bbox": [10, 8, 20, "20"]}, ["bad-box"]),
    ({"bbox": [math.nan, 8, 20, 20]}, ["bad-box"]),
    ({"bbox": [10, 8, math.inf, 20]}, ["bad-box"]),
    ({"bbox": [10**400, 8, 20, 20]}, ["bad-box"]),
    ({"bbox": {"x": 10}}, ["bad-box"]),
    (
        {"segmentation": [[0, 8, 20, 8, 20, 28, 0, 28]], "bbox": [-4, 8, 24, 20]},
        ["outside-box"],
    ),
    ({"area": -5}, ["bad-area"]),
    ({"area": math.nan}, ["bad-area"]),
    ({"area": "400"}, ["bad-area"]),
    ({"area": 10**9}, ["bad-area"]),
    ({"area": 40}, ["bad-area"]),
    # ids
    ({"image_id": 777}, ["unknown-picture"]),
    ({"image_id": "1"}, ["unknown-picture"]),
    ({"category_id": 4}, ["unknown-category"]),
    ({"image_id": 777, "category_id": 4}, ["unknown-picture", "unknown-category"]),
    ({"image_id": None}, ["wrong-type"]),
    ({"image_id": [1]}, ["wrong-type"]),
    ({"image_id": 1.5}, ["wrong-type"]),
    ({"category_id": "3"}, ["wrong-type"]),
    ({"category_id": True}, ["wrong-type"]),
    ({"category_id": 2**60}, ["wrong-type"]),
    # several at once are all found
    (
        {"category_id": 4, "segmentation": [[1, 2]], "bbox": [1], "area": 0},
        ["unknown-category", "few-points", "bad-box", "bad-area"],
    ),
]


@pytest.mark.parametrize(("changes", "kinds"), ANNOTATIONS, ids=lambda value: str(value)[:60])
def test_an_annotation(clean: Path, content: dict, changes: dict, kinds: list[str]) -> None:
    entry = {"id": 9001, "image_id": 1, "category_id": 3, "segmentation": [SQUARE], **changes}
    values = {**content, "annotations": [*content["annotations"], entry]}
    faults = find(clean, values)
    assert pairs(faults) == [(kind, 9001) for kind in kinds]
    assert all(fault.message.startswith("annotation 9001: ") for fault in faults)
    assert all(fault.file == str(clean / "broken.json") for fault in faults)
    if FATAL & set(kinds):
        with pytest.raises(InputError):
            CocoSet(clean / "broken.json")
    else:
        assert len(CocoSet(clean / "broken.json").skipped) == bool(UNUSABLE & set(kinds))


# --------------------------------------------------------------------------------- the json


def drop(values: dict, key: str) -> None:
    del values[key]


def keep_few(values: dict) -> None:
    """Leave 9 objects of class 3 and none of class 7, and a picture more than that needs."""
    third = [entry for entry in values["annotations"] if entry["category_id"] == 3][9:]
    out = [entry["id"] for entry in third]
    values["annotations"] = [
        entry
        for entry in values["annotations"]
        if entry["category_id"] != 7 and entry["id"] not in out
    ]
    peopled = {entry["image_id"] for entry in values["annotations"]}
    values["images"] = [entry for entry in values["images"] if entry["id"] in peopled]


def again(values: dict, key: str, **changes: object) -> None:
    values[key].append({**values[key][0], **changes})


NEW = {"id": 500, "file_name": "train_00000.png", "height": 64, "width": 80}

SETS: list[tuple[str, Callable[[dict], object], list[tuple[str, object]]]] = [
    ("no images", lambda v: drop(v, "images"), [("missing-key", None)]),
    ("no annotations", lambda v: drop(v, "annotations"), [("missing-key", None)]),
    ("no categories", lambda v: drop(v, "categories"), [("missing-key", None)]),
    ("images no list", lambda v: v.update(images={}), [("wrong-type", None)]),
    ("annotations no list", lambda v: v.update(annotations="x"), [("wrong-type", None)]),
    ("an image no object", lambda v: v["images"].append(3), [("wrong-type", None)]),
    ("an annotation no object", lambda v: v["annotations"].append([]), [("wrong-type", None)]),
    ("a category no object", lambda v: v["categories"].append("star"), [("wrong-type", None)]),
    ("no name", lambda v: drop(v["categories"][0], "name"), [("missing-key", 3)]),
    ("name a number", lambda v: v["categories"][0].update(name=4), [("wrong-type", 3)]),
    ("no picture id", lambda v: v["images"].append({**NEW, "id": None}),
     [("wrong-type", None), ("duplicate-picture", None)]),
    ("no file_name", lambda v: drop(v["images"][0], "file_name"), [("missing-key", 1)]),
    ("file_name null", lambda v: v["images"][0].update(file_name=None), [("wrong-type", 1)]),
    ("file_name with a zero", lambda v: v["images"][0].update(file_name="a\0"),
     [("wrong-type", 1)]),
    ("no height", lambda v: drop(v["images"][0], "height"), [("missing-key", 1)]),
    ("height a text", lambda v: v["images"][0].update(height="64"), [("wrong-type", 1)]),
    ("height NaN", lambda v: v["images"][0].update(height=math.nan), [("wrong-type", 1)]),
    ("height infinite", lambda v: v["images"][0].update(height=math.inf), [("wrong-type", 1)]),
    ("height 0", lambda v: v["images"][0].update(height=0), [("bad-size", 1)]),
    ("height negative", lambda v: v["images"][0].update(height=-64), [("bad-size", 1)]),
    ("height huge", lambda v: v["images"][0].update(height=10**9), [("bad-size", 1)]),
    ("height beyond floats", lambda v: v["images"][0].update(height=10**400), [("wrong-type", 1)]),
    ("a picture id twice", lambda v: again(v, "images"),
     [("duplicate-picture-id", 1), ("duplicate-picture", 1)]),
    ("a picture twice", lambda v: again(v, "images", id=500),
     [("duplicate-picture", 500), ("pictures-without-objects", None)]),
    ("a category id twice", lambda v: again(v, "categories", name="x"),
     [("duplicate-category-id", 3)]),
    ("a class name twice", lambda v: v["categories"][1].update(name=" Star"),
     [("duplicate-name", 7)]),
    ("an annotation id twice", lambda v: v["annotations"][5].update(id=1),
     [("duplicate-annotation-id", 1)]),
    ("an annotation without id", lambda v: drop(v["annotations"][0], "id"), [("bad-id", None)]),
    ("an annotation's id null", lambda v: v["annotations"][0].update(id=None),
     [("bad-id", None)]),
    ("an object twice", lambda v: again(v, "annotations", id=9000), [("duplicate-object", 9000)]),
    ("an empty class", lambda v: v["categories"].append({"id": 21, "name": "x"}),
     [("empty-class", 21)]),
    ("few objects", keep_few, [("empty-class", 7), ("rare-class", 3)]),
    ("no objects", lambda v: v.update(annotations=[]), [("no-objects", None)]),
    ("ids shifted by one",
     lambda v: v.update(annotations=[e | {"category_id": e["category_id"] + 1}
                                     for e in v["annotations"][:2]]),
     [("unknown-category", 1), ("unknown-category", 2), ("shifted-ids", None),
      ("no-objects", None)]),
    ("crowd regions only",
     lambda v: v.update(annotations=[{**v["annotations"][0], "iscrowd": 1}]),
     [("no-objects", None)]),
    ("a picture missing", lambda v: v["images"][0].update(file_name="train_00000.jpg"),
     [("missing-picture", 1)]),
    ("a folder as picture", lambda v: v["images"][0].update(file_name="../images"),
     [("unreadable-picture", 1)]),
    ("a name too long", lambda v: v["images"][0].update(file_name="x" * 5000),
     [("unreadable-picture", 1)]),
    ("a name in half a surrogate pair", lambda v: v["images"][0].update(file_name="\ud800"),
     [("unreadable-picture", 1)]),
    ("Windows' separators", lambda v: v["images"][0].update(file_name="images\\train_00000.png"),
     [("missing-picture", 1)]),
    ("height and width exchanged",
     lambda v: v["images"].append({**NEW, "file_name": "val_00000.png", "height": 80, "width": 64}),
     [("swapped-size", 500), ("pictures-without-objects", None)]),
    ("another size",
     lambda v: v["images"].append({**NEW, "file_name": "val_00000.png", "height": 65}),
     [("wrong-size", 500), ("pictures-without-objects", None)]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), [s[1:] for s in SETS], ids=[s[0] for s in SETS])
def test_a_set(
    clean: Path,
    content: dict,
    change: Callable[[dict], object],
    expected: list[tuple[str, object]],
) -> None:
    values = copy.deepcopy(content)
    change(values)
    assert pairs(find(clean, values)) == expected
    try:
        CocoSet(clean / "broken.json")
    except InputError:
        assert FATAL & {kind for kind, _ in expected}
    else:
        assert not FATAL & {kind for kind, _ in expected}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"images": [}', "[" * 100_000, "9" * 5000]
)
def test_no_json(clean: Path, text: str) -> None:
    assert pairs(find(clean, text)) == [("bad-json", None)]


def test_a_file_or_folder_that_is_not_there(clean: Path) -> None:
    assert pairs(check(clean / "none.json", progress=False)) == [("bad-json", None)]
    assert pairs(check(clean, progress=False)) == [("unknown-format", None)]
    # said once, and not of every picture
    faults = check(clean / "train.json", clean / "none", progress=False)
    assert pairs(faults) == [("missing-folder", None)]


def test_a_clean_set(clean: Path) -> None:
    val = clean / "val.json"
    assert check(clean / "train.json", progress=False) == []
    assert check(clean / "train.json", clean / "images", against=val, progress=False) == []


def test_hints_where_a_picture_is(clean: Path, content: dict) -> None:
    values = copy.deepcopy(content)
    for entry, name in zip(values["images"], ("TRAIN_00000.PNG", "a\\b.png"), strict=False):
        entry["file_name"] = name
    one, other = find(clean, values)
    assert "there is train_00000.png" in one.message
    assert "write / for" in other.message


# ------------------------------------------------------------------------------- pictures


def first(place: Path) -> Path:
    return place / "images" / "train_00000.png"


def truncate(place: Path) -> None:
    first(place).write_bytes(first(place).read_bytes()[:-200])


def store_turned(place: Path, orientation: int, *, json_as: tuple[int, int] | None = None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(first(place)).save(first(place), exif=exif)
    if json_as:
        values = json.loads((place / "train.json").read_text())
        values["images"][0].update(height=json_as[0], width=json_as[1])
        values["annotations"] = [
            {**entry, "segmentation": [SQUARE], "bbox": None, "area": None}
            if entry["image_id"] == 1
            else entry
            for entry in values["annotations"]
        ]
        (place / "train.json").write_text(json.dumps(values))


def save_floats(place: Path) -> None:
    Image.fromarray(np.ones(SIZE, np.float32)).save(place / "images" / "f.tiff")
    shutil.move(place / "images" / "f.tiff", first(place))


def copy_to(name: str) -> Callable[[Path], None]:
    return lambda place: shutil.copy(first(place), place / "images" / name) and None


def brighten(name: str) -> Callable[[Path], None]:
    """The picture once more: smaller by a few pixels' worth of detail, brighter, as JPEG."""

    def change(place: Path) -> None:
        image = Image.open(first(place)).convert("RGB")
        image = image.resize((60, 48)).resize((80, 64)).point(lambda value: value * 0.8 + 30)
        image.save(place / "images" / "new.jpg", quality=70)
        shutil.move(place / "images" / "new.jpg", place / "images" / name)

    return change


def save_grey(most: int) -> Callable[[Path], object]:
    """The first picture with 16 bits, its values up to ``most``."""

    def change(place: Path) -> None:
        grey = np.asarray(Image.open(first(place)).convert("L")).astype(float)
        stretched = (grey - grey.min()) / np.ptp(grey) * most
        Image.fromarray(stretched.round().astype(np.uint16)).save(first(place))

    return change


PICTURES: list[tuple[str, Callable[[Path], object], list[tuple[str, object]]]] = [
    ("gone", lambda p: first(p).unlink(), [("missing-picture", 1)]),
    ("empty", lambda p: first(p).write_bytes(b""), [("unreadable-picture", 1)]),
    ("a text", lambda p: first(p).write_text("no picture"), [("unreadable-picture", 1)]),
    ("truncated", truncate, [("unreadable-picture", 1)]),
    ("floats", save_floats, [("unreadable-picture", 1)]),
    ("larger", lambda p: Image.new("RGB", (90, 64)).save(first(p)), [("wrong-size", 1)]),
    ("turned", lambda p: store_turned(p, 6), [("turned-picture", 1)]),
    ("turned the other way", lambda p: store_turned(p, 8), [("turned-picture", 1)]),
    ("upside down", lambda p: store_turned(p, 3), [("orientation", 1)]),
    ("mirrored", lambda p: store_turned(p, 2), [("orientation", 1)]),
    ("upright", lambda p: store_turned(p, 1), []),
    ("an orientation that is none", lambda p: store_turned(p, 77), []),
    ("twice", copy_to("train_00001.png"), [("duplicate-picture", 2)]),
    ("in both", copy_to("val_00002.png"), [("leaked-picture", 1)]),
    ("twice and in both",
     lambda p: [copy_to(n)(p) for n in ("train_00001.png", "train_00002.png", "val_00002.png")],
     [("leaked-picture", 1), ("duplicate-picture", 2), ("duplicate-picture", 3)]),
    ("almost twice", brighten("train_00001.png"), [("near-duplicate", 2)]),
    ("almost in both", brighten("val_00002.png"), [("near-leak", 1)]),
    ("12 of 16 bits", save_grey(4095), [("dark-picture", 1)]),
    ("hardly more", save_grey(4096), []),
    ("16 bits of zeros", save_grey(0), []),
    ("all grey",
     lambda p: [Image.new("RGB", (80, 64), (g, g, g)).save(p / f"images/train_0000{g}.png")
                for g in range(3)], []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"), [case[1:] for case in PICTURES], ids=[case[0] for case in PICTURES]
)
def test_a_picture(
    place: Path, change: Callable[[Path], object], expected: list[tuple[str, object]]
) -> None:
    change(place)
    faults = check(place / "train.json", against=place / "val.json", progress=False)
    assert pairs(faults) == expected


def test_upright_labels_of_a_turned_picture_are_right(place: Path) -> None:
    store_turned(place, 6, json_as=(WIDTH, HEIGHT))
    kinds = {fault.kind for fault in check(place / "train.json", progress=False)}
    assert kinds <= {"duplicate-object"}  # from the same square for every object of the picture
    (place / "images" / "train_00000.png").unlink()
    Image.new("RGB", (31, 17)).save(first(place))
    store_turned(place, 6)
    faults = check(place / "train.json", progress=False)
    wrong = [fault for fault in faults if fault.kind == "wrong-size"]
    assert "neither with nor without EXIF orientation 6" in wrong[0].message
    assert "31 x 17" in wrong[0].message


def test_a_square_picture_turned_says_nothing_by_its_size(place: Path) -> None:
    Image.open(first(place)).resize((64, 64)).save(first(place))
    store_turned(place, 6, json_as=(64, 64))
    kinds = {fault.kind for fault in check(place / "train.json", progress=False)}
    assert "orientation" in kinds


def test_the_same_pixels_in_another_shape_are_no_twin(place: Path) -> None:
    values = json.loads((place / "train.json").read_text())
    Image.new("RGB", (80, 64), "red").save(place / "images" / "wide.png")
    Image.new("RGB", (64, 80), "red").save(place / "images" / "tall.png")
    ramp = Image.linear_gradient("L")
    ramp.resize((80, 64)).save(place / "images" / "ramp.png")
    ramp.resize((40, 64)).save(place / "images" / "narrow.png")
    for number, (name, w, h) in enumerate(
        [("wide", 80, 64), ("tall", 64, 80), ("ramp", 80, 64), ("narrow", 40, 64)]
    ):
        entry = {"id": 500 + number, "file_name": f"{name}.png", "width": w, "height": h}
        values["images"].append(entry)
    assert pairs(find(place, values)) == [("pictures-without-objects", None)]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"category_id": 99}, "unknown-category"),
        ({"image_id": 99}, "unknown-picture"),
        ({"segmentation": [[0, 0.02, 70, 0.02, 72, 0.3, 0, 0.2]]}, "sliver"),
    ],
)
def test_what_training_leaves_out_is_no_object(
    clean: Path, content: dict, changes: dict, kind: str
) -> None:
    entry = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [SQUARE], **changes}
    faults = find(clean, {**content, "annotations": [entry]})
    assert {fault.kind for fault in faults} == {kind, "no-objects"}


def test_messages_name_the_twin(place: Path) -> None:
    copy_to("val_00002.png")(place)
    (fault,) = check(place / "train.json", against=place / "val.json", progress=False)
    assert "train_00000.png" in fault.message
    assert f"val_00002.png) of {place / 'val.json'}" in fault.message
    assert fault.file == str(first(place))


# ---------------------------------------------------------------------- train against val


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v["categories"][0].update(name="sun"), [3]),
        (lambda v: v["categories"].append({"id": 21, "name": "x"}), [21]),
        (lambda v: v["categories"][0].update(id=4), [3, 4]),
        (lambda v: [entry.update(id=entry["id"] + 1) for entry in v["categories"]], [None]),
        (lambda v: [entry.update(id=entry["id"] - 1) for entry in v["categories"]], [None]),
        (lambda v: v["categories"].pop(), [20]),
        (lambda v: v["categories"].reverse(), []),
    ],
)
def test_classes_of_train_and_val(
    clean: Path, change: Callable[[dict], object], expected: list[int]
) -> None:
    values = json.loads((clean / "val.json").read_text())
    change(values)
    other = clean / "other.json"
    other.write_text(json.dumps(values))
    faults = check(clean / "train.json", against=other, progress=False)
    assert pairs(faults) == [("class-mismatch", number) for number in expected]
    assert {fault.file for fault in faults} <= {str(other)}


def test_faults_of_the_other_json_are_found(clean: Path) -> None:
    other = clean / "other.json"
    other.write_text("{")
    assert pairs(check(clean / "train.json", against=other, progress=False)) == [("bad-json", None)]
    values = json.loads((clean / "val.json").read_text())
    values["images"][0]["file_name"] = "none.png"
    other.write_text(json.dumps(values))
    faults = check(clean / "train.json", against=other, progress=False)
    assert pairs(faults) == [("missing-picture", values["images"][0]["id"])]


def test_a_set_against_itself_is_all_leaked(clean: Path) -> None:
    train = clean / "train.json"
    faults = check(train, against=train, progress=False)
    assert pairs(faults) == [("leaked-picture", number) for number in range(1, 21)]


# ---------------------------------------------------------------------------- crossing sides


def crosses_slowly(points: list[tuple[int, int]]) -> bool:
    """Pair by pair in whole numbers."""
    sides = list(zip(points, [*points[1:], points[0]], strict=True))
    sides = [(a, b) for a, b in sides if sides.count((a, b)) > sides.count((b, a))]

    def turn(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> int:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    return any(
        turn(a, b, c) * turn(a, b, d) < 0 and turn(c, d, a) * turn(c, d, b) < 0
        for number, (a, b) in enumerate(sides)
        for c, d in sides[:number]
    )


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=9),
    st.sampled_from([1.0, 0.1, 0.37, 1000 / 7]),
)
def test_crossing_sides(points: list[tuple[int, int]], scale: float) -> None:
    found = find_crossing(np.array(points, dtype=np.float64) * scale + 1 / 3)
    assert (found is not None) == crosses_slowly(points)


def test_an_outline_of_many_points_is_taken_in_blocks() -> None:
    angles = np.linspace(0, 2 * np.pi, 2500, endpoint=False)
    circle = 300 + 200 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert find_crossing(circle) is None
    late = circle.copy()
    late[[2400, 2402]] = late[[2402, 2400]]  # a knot that only the last block holds
    assert find_crossing(late) is not None
    circle[[2000, 2250]] = circle[[2250, 2000]]
    assert find_crossing(circle) is not None


# ------------------------------------------------------------------------ the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cli.main(["data", "check", *(str(argument) for argument in arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out


def snapshot(folder: Path) -> dict[str, tuple[bytes, float]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime) for p in folder.rglob("*") if p.is_file()}


def test_command(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    train, val = place / "train.json", place / "val.json"
    values = json.loads(train.read_text())
    warned, wrong = place / "warned.json", place / "wrong.json"
    bad = {"id": 8, "image_id": 1, "category_id": 3, "segmentation": [SQUARE]}
    extra = [{**bad, "id": 9000 + n, "bbox": [n, n, 0, 0]} for n in range(5)]
    for n, entry in enumerate(extra):
        entry["segmentation"] = [[value + n for value in SQUARE]]
    warned.write_text(json.dumps({**values, "annotations": values["annotations"] + extra}))
    unusable = [{**bad, "id": 9100, "category_id": 99}, {**bad, "id": 9101, "segmentation": []}]
    wrong.write_text(json.dumps({**values, "annotations": values["annotations"] + unusable}))
    before = snapshot(place)

    assert run(capsys, train, "--against", val, "--strict") == (0, "no faults\n")
    code, out = run(capsys, warned)
    assert code == 0
    assert "empty-box" in out
    assert "annotation 9002" in out
    assert "annotation 9003" not in out
    assert "and 2 more" in out
    assert out.splitlines()[-1] == "5 warnings"
    assert run(capsys, warned, "--strict")[0] == 1
    assert "annotation 9004" in run(capsys, warned, "--all")[1]
    code, out = run(capsys, wrong, "--images", place / "images", "--json")
    assert code == 2
    assert [(fault["kind"], fault["id"]) for fault in json.loads(out)] == [
        ("unknown-category", 9100),
        ("no-mask", 9101),
    ]
    assert set(json.loads(out)[0]) == {"severity", "kind", "file", "id", "message", "advice"}
    assert run(capsys, place / "none.json")[0] == 2
    assert run(capsys, train, "--json") == (0, "[]\n")
    assert snapshot(place) == before


def test_notes_change_no_exit_code(clean: Path, content: dict) -> None:
    values = copy.deepcopy(content)
    gone = values["images"][0]["id"]
    values["annotations"] = [a for a in values["annotations"] if a["image_id"] != gone]
    faults = find(clean, values)
    assert pairs(faults) == [("pictures-without-objects", None)]
    assert "1 of 20 pictures" in faults[0].message
    assert exit_code(faults, strict=True) == 0
    assert summarise(faults) == "1 note"


def test_an_object_without_mask_in_a_picture_without_size(content: dict, clean: Path) -> None:
    values = copy.deepcopy(content)
    entry = values["annotations"][0]
    del entry["segmentation"]
    picture = next(p for p in values["images"] if p["id"] == entry["image_id"])
    del picture["height"]
    faults = find(clean, values)
    assert ("missing-key", picture["id"]) in pairs(faults)
