"""Conversion: what a format can hold comes back bit by bit, what it cannot is measured."""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from brefine import cli
from brefine.data.convert import convert
from brefine.data.read import read
from brefine.rle import decode
from brefine.structures import InputError
from samples import blob, dense_rle

FORMATS = ("coco", "yolo", "masks", "labelme")
SIZE = (11, 13)
CLASSES = ("cell", "cell_wall", "dust")  # ids 10, 20, 30

objects = st.tuples(st.integers(0, 2), arrays(bool, SIZE), st.booleans())
pictures = st.lists(st.lists(objects, max_size=4), min_size=1, max_size=3)


def make(folder, sets, classes=CLASSES, names=None, size=SIZE):
    """A COCO json with its pictures; objects are (label, mask, crowd), empty masks left out."""
    names = names or [f"{i}.png" for i in range(len(sets))]
    content = {
        "info": {"year": 2001},
        "images": [],
        "annotations": [],
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(classes)],
    }
    for i, (name, found) in enumerate(zip(names, sets, strict=True)):
        file = folder / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size[::-1], (40 * i, 90, 90)).save(file)
        content["images"].append(
            {"id": 7 * i + 1, "file_name": name, "height": size[0], "width": size[1]}
        )
        for label, mask, crowd in found:
            if mask.any():
                content["annotations"].append(
                    {
                        "id": 5 * len(content["annotations"]) + 2,
                        "image_id": 7 * i + 1,
                        "category_id": 10 * (label + 1),
                        "segmentation": dense_rle(mask),
                        "iscrowd": int(crowd),
                    }
                )
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


def masks_of(path):
    """(class, dense mask) of every object by the name of its picture, in order."""
    dataset = read(path / "labels.json" if (path / "labels.json").is_file() else path, quiet=True)
    assert dataset.skipped == []
    found = {}
    for index, picture in enumerate(dataset.pictures):
        target = dataset.target(index)
        dense = target.masks.dense(picture.size).numpy().astype(bool)
        names = [dataset.categories[label].name for label in target.labels]
        found[picture.file.name] = list(zip(names, dense, strict=True))
    return found


def counted(found):
    return {
        picture: Counter((name, mask.tobytes()) for name, mask in objects)
        for picture, objects in found.items()
    }


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


@settings(max_examples=25, deadline=None)
@given(pictures)
@pytest.mark.parametrize("to", FORMATS)
def test_round_trip(to, sets):
    """Parts, holes and overlaps of three classes: every format holds them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = make(folder / "start", sets)
        there = convert(start, folder / "there", to)
        before, after = counted(masks_of(folder / "start")), counted(masks_of(folder / "there"))
        assert after == before
        if to == "masks":  # read from pixels, the run lengths are those of pycocotools
            dataset = read(folder / "there", quiet=True)
            for index, picture in enumerate(dataset.pictures):
                for entry in dataset.annotations(index):
                    runs = decode(entry["segmentation"], picture.size)
                    dense = np.zeros(picture.size, dtype=bool)
                    window, (x, y) = runs.window()
                    dense[y : y + window.shape[0], x : x + window.shape[1]] = window
                    assert entry["segmentation"] == dense_rle(dense)
        convert(folder / "there" / ("labels.json" if to == "coco" else ""), folder / "back", "coco")
        assert counted(masks_of(folder / "back")) == before
        total = there.as_dict()
        assert total["objects"] == sum(n.total() for n in before.values())
        assert (total["changed"], total["lost"], total["mean_iou"]) == (0, 0, 1)
        crowds = sum(crowd and mask.any() for found in sets for _, mask, crowd in found)
        assert total["crowd"] == (0 if to == "coco" else crowds)


@pytest.mark.parametrize("to", FORMATS)
def test_toy_set(toy_set, tmp_path, to):
    before = masks_of(toy_set / "train.json")
    assert any(has_hole(mask) for found in before.values() for _, mask in found)
    report = convert(toy_set / "train.json", tmp_path / "there", to, pictures="link")
    assert report.as_dict()["changed"] == 0
    assert counted(masks_of(tmp_path / "there")) == counted(before)


def has_hole(mask):
    from brefine.outlines import trace

    return any(len(part) > 1 for part in trace(mask))


def check_losses(before, after, report):
    """The losses reported are those between what was there and what is read back."""
    for loss in report.losses:
        old = [mask for _, mask in before[loss.picture]]
        new = [mask for _, mask in after[loss.picture]]
        assert len(old) == len(new) + loss.lost
        if old and not loss.lost:
            ious = [iou(*pair) for pair in zip(old, new, strict=True)]
            assert loss.mean_iou == pytest.approx(np.mean(ious))
            assert loss.worst_iou == pytest.approx(min(ious))
            assert loss.changed == sum(value < 1 for value in ious)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 4))
@pytest.mark.parametrize("to", ["yolo", "labelme"])
def test_losses_are_those_read_back(to, seed, tolerance):
    random = np.random.default_rng(seed)
    size = (40, 50)
    sets = [[(0, blob(random, size), False) for _ in range(3)] for _ in range(2)]
    with tempfile.TemporaryDirectory() as place:
        start = make(Path(place) / "start", sets, size=size)
        report = convert(start, Path(place) / "there", to, tolerance=tolerance)
        # An object that has lost all its pixels is one that the reader leaves out.
        dataset = read(Path(place) / "there", quiet=True)
        lost = sum(loss.lost for loss in report.losses)
        assert len(dataset.skipped) == lost
        if not lost:
            check_losses(masks_of(start.parent), masks_of(Path(place) / "there"), report)


def test_tolerance_saves_points_and_costs_pixels(tmp_path):
    y, x = np.mgrid[:120, :120]
    disc = np.hypot(y - 60, x - 60) < 50
    start = make(tmp_path / "start", [[(0, disc, False)]], size=disc.shape)
    exact = convert(start, tmp_path / "exact", "yolo")
    rough = convert(start, tmp_path / "rough", "yolo", tolerance=1)
    assert exact.losses[0].mean_iou == 1 > rough.losses[0].mean_iou > 0.95
    texts = [(tmp_path / name / "labels/0.txt").read_text() for name in ("exact", "rough")]
    assert len(texts[1]) < len(texts[0]) / 3
    check_losses(masks_of(start.parent), masks_of(tmp_path / "rough"), rough)


def test_id_maps_lose_overlaps_only(tmp_path):
    big, small, ring = (np.zeros((20, 20), dtype=bool) for _ in range(3))
    big[2:14, 2:14], small[10:18, 10:18], ring[3:6, 3:6] = True, True, True
    ring[4, 4] = False
    start = make(
        tmp_path / "start",
        [[(0, small, False), (0, big, False), (0, ring, False)], []],
        classes=["cell"],
        size=(20, 20),
    )
    report = convert(start, tmp_path / "there", "masks")
    assert [f"{path.name}" for path in sorted((tmp_path / "there/masks").iterdir())] == [
        "0.png", "1.png",
    ]  # fmt: skip
    after = masks_of(tmp_path / "there")
    check_losses(masks_of(start.parent), after, report)
    assert [name for name, _ in after["0.png"]] == ["object"] * 3
    np.testing.assert_array_equal(after["0.png"][0][1], small)  # smaller ones lie on top
    np.testing.assert_array_equal(after["0.png"][1][1], big & ~small & ~ring)
    np.testing.assert_array_equal(after["0.png"][2][1], ring)
    assert report.losses[0].changed == 1
    assert after["1.png"] == []
    assert any("'cell' becomes 'object'" in note for note in report.notes)


def test_a_hidden_object_is_reported_lost(tmp_path):
    mask = np.ones((5, 5), dtype=bool)
    start = make(tmp_path / "s", [[(0, mask, False)] * 2], classes=["object"], size=(5, 5))
    (loss,) = convert(start, tmp_path / "t", "masks").losses
    assert (loss.objects, loss.changed, loss.lost) == (2, 1, 1)
    assert (loss.mean_iou, loss.worst_iou) == (0.5, 0)
    assert len(masks_of(tmp_path / "t")["0.png"]) == 1


def test_more_than_255_objects_take_16_bits(tmp_path):
    cells = []
    for i in range(300):
        mask = np.zeros((20, 20), dtype=bool)
        mask[i // 20, i % 20] = True
        cells.append((0, mask, False))
    start = make(tmp_path / "s", [cells], classes=["object"], size=(20, 20))
    assert convert(start, tmp_path / "t", "masks").as_dict()["changed"] == 0
    assert Image.open(tmp_path / "t/masks/0.png").mode.startswith("I;16")
    assert counted(masks_of(tmp_path / "t")) == counted(masks_of(tmp_path / "s"))


def test_coco_keeps_everything(tmp_path):
    """Ids, areas, polygons, crowd, licences and LVIS's lists: only the file's name may change."""
    mask = np.ones(SIZE, dtype=bool)
    start = make(tmp_path / "s", [[(0, mask, False), (1, mask, True)]])
    content = json.loads(start.read_text())
    content["licenses"] = [{"id": 1, "url": "x"}]
    content["images"][0] |= {"license": 1, "coco_url": "http://x/0.png"}
    content["categories"][0]["supercategory"] = "thing"
    polygon = {
        "id": 99, "image_id": 1, "category_id": 30, "segmentation": [[1, 1, 8, 1.5, 4, 9]],
        "area": 33.25, "bbox": [1, 1, 7, 8], "iscrowd": 0, "score": 0.5,
    }  # fmt: skip
    content["annotations"].append(polygon)
    unusable = {"id": 100, "image_id": 1, "category_id": 30, "segmentation": []}
    content["annotations"].append(unusable)
    start.write_text(json.dumps(content))
    convert(start, tmp_path / "t", "coco")
    after = json.loads((tmp_path / "t/labels.json").read_text())
    content["annotations"].remove(unusable)
    for old, new in zip(content["annotations"], after["annotations"], strict=True):
        assert new | old == new  # nothing changed
    filled = after["annotations"][0]
    assert (filled["area"], filled["bbox"]) == (mask.sum(), [0, 0, SIZE[1], SIZE[0]])
    assert {**after, "annotations": 0} == {**content, "annotations": 0}


def test_lvis_stays_lvis(tmp_path):
    """Frequencies and lists are kept in COCO's format; another format's loss of them is told."""
    mask = np.ones(SIZE, dtype=bool)
    start = make(tmp_path / "s", [[(0, mask, False)], []])
    content = json.loads(start.read_text())
    for entry, frequency in zip(content["categories"], "rcf", strict=True):
        entry["frequency"] = frequency
    for entry, absent in zip(content["images"], ([20], [10, 30]), strict=True):
        name = entry.pop("file_name")
        entry |= {"coco_url": f"http://x/images/{name}", "neg_category_ids": absent}
        entry["not_exhaustive_category_ids"] = []
    start.write_text(json.dumps(content))
    convert(start, tmp_path / "t", "coco")
    before, after = read(start, quiet=True), read(tmp_path / "t/labels.json", quiet=True)
    assert after.federated == before.federated
    assert after.federated.negative == ((1,), (0, 2))
    assert all(picture.file.is_relative_to(tmp_path / "t/images") for picture in after.pictures)
    assert all(picture.file.is_file() for picture in after.pictures)
    assert counted(masks_of(tmp_path / "t")) == counted(masks_of(tmp_path / "s"))
    assert any("LVIS" in note for note in convert(start, tmp_path / "u", "yolo").notes)
    assert not any("val" in note for note in convert(start, tmp_path / "w", "masks").notes)


def test_ids_of_other_formats_become_numbers(tmp_path):
    mask = np.ones(SIZE, dtype=bool)
    start = make(tmp_path / "s", [[(0, mask, False)] * 2, [(2, mask, False)]])
    convert(start, tmp_path / "y", "yolo")
    convert(tmp_path / "y" / "data.yaml", tmp_path / "c", "coco")
    content = json.loads((tmp_path / "c/labels.json").read_text())
    assert [entry["id"] for entry in content["images"]] == [1, 2]
    assert [(a["id"], a["image_id"]) for a in content["annotations"]] == [(1, 1), (2, 1), (3, 2)]
    assert [entry["name"] for entry in content["categories"]] == list(CLASSES)


@pytest.mark.parametrize("to", FORMATS)
def test_pictures(tmp_path, to, monkeypatch):
    """Copied, linked or left where they are; folders inside stay."""
    monkeypatch.chdir(tmp_path)
    mask = np.ones(SIZE, dtype=bool)
    names = ["a/x.png", "b/x.png"]
    start = make(Path("s"), [[(0, mask, False)], [(1, mask, False)]], names=names)
    for how in ("copy", "link", "none"):
        out = Path(how)
        convert(start, out, to, pictures=how)
        found = {p.relative_to(out).as_posix(): p for p in out.rglob("x.png") if p.is_file()}
        found = {name: p for name, p in found.items() if not name.startswith("masks/")}
        top = "" if to == "labelme" else "images/"
        assert set(found) == (set() if how == "none" else {top + name for name in names})
        assert all(p.is_symlink() == (how == "link") for p in found.values())
        for name, p in found.items():
            assert p.read_bytes() == Path("s/images", name.removeprefix(top)).read_bytes()
    if to == "labelme":  # it names the pictures where they are
        dataset = read("none", quiet=True)
        assert [picture.file.is_file() for picture in dataset.pictures] == [True, True]
    elif to != "coco":
        os.symlink(Path("s/images").absolute(), "none/images")
        assert len(masks_of(Path("none"))) == 1  # both are named x.png here


def test_a_folder_named_like_a_picture_is_no_set_of_id_maps(tmp_path):
    mask = np.ones(SIZE, bool)
    start = make(
        tmp_path / "s", [[(0, mask, False)]] * 2, classes=CLASSES[:1], names=["x.png", "x/y.png"]
    )
    with pytest.raises(InputError, match=r"x/y\.png: its folder has the name of the picture x: "):
        convert(start, tmp_path / "t", to="masks")
    assert not (tmp_path / "t").exists()


def run(capsys, *arguments):
    code = cli.main(["data", "convert", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    y, x = np.mgrid[:60, :60]
    disc = np.hypot(y - 30, x - 30) < 25
    start = make(tmp_path / "s", [[(0, disc, False), (1, disc, True)]], size=disc.shape)
    code, out, err = run(capsys, start, tmp_path / "t", "--to", "yolo")
    assert code == 0, err
    assert "1 pictures, 1 objects: every mask is kept bit by bit" in out
    assert "1 crowd regions cannot be held" in out
    assert "same pictures as train and as val" in out
    code, out, _ = run(capsys, start, tmp_path / "u", "--to", "yolo", "--tolerance", 2, "--json")
    assert code == 0
    total = json.loads(out)
    assert total["changed"] == 1 > total["mean_iou"] == total["files"][0]["mean_iou"]
    code, out, _ = run(capsys, start, tmp_path / "v", "--to", "yolo", "--tolerance", 2)
    assert f"{total['mean_iou']:.4f}" in out
    assert "0.png" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s/labels.json", "t", "--to", "voc"], "'voc' is not one of"),
        (["s/labels.json", "t"], "--to"),
        (["s/labels.json", "t", "--to", "yolo", "--images", "move"], "'move' is not one of"),
        (["s/labels.json", "t", "--to", "yolo", "--tolerance", "-1"], "--tolerance"),
        (["s/labels.json", "t", "--to", "yolo", "--images-in", "away"], "away: no such folder"),
        (["s/labels.json", "s", "--to", "yolo"], "s: is there already"),
        (["s/labels.json", "s/labels.json", "--to", "coco"], "labels.json: is there already"),
        (["s/labels.json", "s/labels.json/t", "--to", "coco"], "cannot write"),
        (["none.json", "t", "--to", "yolo"], "none.json: no such"),
        (["gone/labels.json", "t", "--to", "yolo"], "0.png: no such picture, and 0 more of 1"),
        (["twins/labels.json", "t", "--to", "masks"], "its labels would be those of a.jpg"),
        (["suffix/labels.json", "t", "--to", "yolo"], "a.gif: its suffix is not one of"),
        (["inside/labels.json", "t", "--to", "yolo"], "must not be named images: rename it"),
        (["slash/labels.json", "t", "--to", "masks"], "'a/b': masks cannot hold this name"),
        (["same/labels.json", "t", "--to", "labelme"], "two categories are named 'a'"),
        (["double/labels.json", "t", "--to", "coco"], "names the picture 0.png twice"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    one = [[(0, np.ones(SIZE, dtype=bool), False)]]
    make(Path("s"), one)
    make(Path("gone"), one)
    Path("gone/images/0.png").unlink()
    make(Path("twins"), one * 2, names=["a.jpg", "a.png"])
    make(Path("suffix"), one, names=["a.gif"])
    make(Path("inside"), one * 2, names=["x/images/a.png", "b.png"])
    make(Path("slash"), one, classes=["a/b", "c"])
    make(Path("same"), one, classes=["a", "a"])
    double = json.loads(make(Path("double"), one * 2).read_text())
    double["images"][1]["file_name"] = "0.png"
    Path("double/labels.json").write_text(json.dumps(double))
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


def test_too_many_objects_for_an_id_map(tmp_path, monkeypatch):
    monkeypatch.setattr("brefine.data.convert.MOST", 1)
    start = make(tmp_path / "s", [[(0, np.ones(SIZE, bool), False)] * 2], classes=["a"])
    with pytest.raises(InputError, match=r"0\.png: 2 objects, an id map holds 1"):
        convert(start, tmp_path / "t", "masks")
    assert not (tmp_path / "t").exists()


def turned(folder, size, said):
    """One object in a picture of ``size`` (height, width) that the json calls ``said``."""
    mask = np.zeros(said, dtype=bool)
    mask[2:5, 3:9] = True
    file = make(folder, [[(0, mask, False)]], size=said)
    Image.new("RGB", size[::-1]).save(folder / "images/0.png")
    return file


@pytest.mark.parametrize("to", ["yolo", "masks", "labelme"])
def test_a_picture_of_another_size_is_refused(tmp_path, to):
    start = turned(tmp_path / "s", SIZE[::-1], SIZE)
    with pytest.raises(InputError, match=r"0\.png: 13 x 11 pixels .* turned upright"):
        convert(start, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    convert(start, tmp_path / "coco", "coco")  # says what the json says


@pytest.mark.parametrize("ids", [["a", "b", 3], [7, 7, 8], [None, 4, 5]])
def test_ids_stay_or_it_is_said(tmp_path, ids, capsys):
    mask = np.ones(SIZE, dtype=bool)
    start = make(tmp_path / "s", [[(0, mask, False)] * 3])
    content = json.loads(start.read_text())
    for entry, number in zip(content["annotations"], ids, strict=True):
        entry["id"] = number
    start.write_text(json.dumps(content))
    convert(start, tmp_path / "out", "coco")
    found = json.loads((tmp_path / "out/labels.json").read_text())["annotations"]
    unique = ids[0] == "a"
    assert [entry["id"] for entry in found] == (ids if unique else [1, 2, 3])
    assert ("ids of annotations become 1, 2, ..." in capsys.readouterr().err) is not unique


def test_a_json_of_any_name_keeps_what_it_says(tmp_path):
    start = make(tmp_path / "s", [[(0, np.ones(SIZE, dtype=bool), False)]])
    other = start.rename(start.with_suffix(".coco"))
    convert(other, tmp_path / "out", "coco")
    content = json.loads((tmp_path / "out/labels.json").read_text())
    assert content["info"] == {"year": 2001}
    assert [entry["id"] for entry in content["annotations"]] == [2]


@pytest.mark.parametrize("to", ["coco", "masks"])
def test_a_tolerance_without_polygons_is_refused(tmp_path, to):
    start = make(tmp_path / "s", [[(0, np.ones(SIZE, dtype=bool), False)]])
    with pytest.raises(InputError, match=rf"--tolerance 2: {to} has no polygons"):
        convert(start, tmp_path / "out", to, tolerance=2.0)


def test_pictures_are_found_from_behind_a_link(tmp_path):
    start = make(tmp_path / "s", [[(0, np.ones(SIZE, dtype=bool), False)]])
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    convert(start, tmp_path / "link/out", "labelme", pictures="none")
    out = tmp_path / "real/deep/out"
    place = json.loads((out / "0.json").read_text())["imagePath"]
    assert (out / place).samefile(tmp_path / "s/images/0.png")


def test_names_that_a_format_reads_otherwise_are_refused(tmp_path):
    mask = np.ones(SIZE, dtype=bool)
    start = make(tmp_path / "s", [[(0, mask, False)]], names=["a\\b.png"])
    with pytest.raises(InputError, match="labelme cannot name this picture"):
        convert(start, tmp_path / "out", "labelme")
    start = make(tmp_path / "t", [[(0, mask, False)]] * 2, names=["a.png", "a/cell_0001.png"])
    with pytest.raises(InputError, match=r"is named as a mask of the picture a would be"):
        convert(start, tmp_path / "out", "masks")


def test_here_is_a_new_folder_like_any_other(tmp_path, monkeypatch):
    start = make(tmp_path / "s", [[(0, np.ones(SIZE, dtype=bool), False)]])
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    convert(start, ".", "coco")
    # The folder stays the one that the shell is in.
    assert sorted(os.listdir(".")) == ["images", "labels.json"]
    assert sorted(os.listdir(tmp_path)) == ["here", "s"]
