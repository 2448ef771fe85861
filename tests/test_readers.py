import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from brefine import cli
from brefine.data import masks_folder
from brefine.data.coco import CocoSet
from brefine.data.loader import read_labelled
from brefine.data.pictures import read_rgb, upright_size
from brefine.data.read import read
from brefine.structures import InputError
from conftest import tiny_recipe

SIZE = 40, 60  # height, width


def dense(dataset, index=0):
    target = dataset.target(index)
    return target.masks.dense(target.size).numpy()


def picture(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], "white").save(path, **options)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def runs_of(mask):
    """(x, top, bottom) of each run of pixels down a column."""
    found = []
    for x, column in enumerate(mask.T.astype(int)):
        edges = np.diff(column, prepend=0, append=0)
        tops, bottoms = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        found += [(x, int(a), int(b)) for a, b in zip(tops, bottoms, strict=True)]
    return found


def bridged(mask):
    """Any mask as one polygon: each run a rectangle, tied to (0, 0) by a bridge of no width."""
    points = []
    for x, a, b in runs_of(mask):
        points += [(0, 0), (x, a), (x + 1, a), (x + 1, b), (x, b), (x, a)]
    return points


def yolo_line(index, points, size=SIZE):
    shares = [f"{x / size[1]:.8f} {y / size[0]:.8f}" for x, y in points]
    return f"{index} " + " ".join(shares)


def shape(label, points, kind="polygon", group=None):
    points = [list(point) for point in points]
    return {"label": label, "points": points, "shape_type": kind, "group_id": group}


def save_ids(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(path)


def refused(path, *parts, **options):
    with pytest.raises(InputError) as caught:
        read(path, **options)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert str(part) in line, line
    return line


# --- the toy set, written in each format, comes back as it was


def write_yolo(toy, folder):
    for split in ("train", "val"):
        labelled = CocoSet(toy / f"{split}.json")
        for index, entry in enumerate(labelled.pictures):
            place = folder / "images" / split / entry.file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(entry.file, place)
            lines = [
                yolo_line(label, bridged(mask), entry.size)
                for label, mask in zip(
                    labelled.target(index).labels.tolist(), dense(labelled, index), strict=True
                )
            ]
            write(folder / "labels" / split / f"{entry.file.stem}.txt", "\n".join(lines))
    names = [category.name for category in labelled.categories]
    write(folder / "set.yaml", json.dumps({"names": names, "path": ".", "train": "images/train",
                                           "val": "images/val"}))  # fmt: skip
    return {"train": folder / "set.yaml", "val": folder / "set.yaml"}


def write_masks(toy, folder):
    for split in ("train", "val"):
        labelled = CocoSet(toy / f"{split}.json")
        write(folder / split / "classes.txt", "\n".join(c.name for c in labelled.categories))
        for index, entry in enumerate(labelled.pictures):
            place = folder / split / "images" / entry.file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(entry.file, place)
            labels = labelled.target(index).labels.tolist()
            for number, mask in enumerate(dense(labelled, index)):
                name = f"{labelled.categories[labels[number]].name}_{number:03}.png"
                save_ids(folder / split / "masks" / entry.file.stem / name, mask * 255)
    return {"train": folder / "train", "val": folder / "val"}


def write_labelme(toy, folder):
    for split in ("train", "val"):
        labelled = CocoSet(toy / f"{split}.json")
        write(folder / split / "classes.txt", "\n".join(c.name for c in labelled.categories))
        for index, entry in enumerate(labelled.pictures):
            shutil.copy(entry.file, folder / split / entry.file.name)
            labels = labelled.target(index).labels.tolist()
            shapes = []
            for number, mask in enumerate(dense(labelled, index)):
                name = labelled.categories[labels[number]].name
                for x, a, b in runs_of(mask):
                    corners = [(x + 1, a), (x, b)]  # any two opposite ones
                    shapes.append(shape(name, corners, "rectangle", number))
            content = {"shapes": shapes, "imagePath": entry.file.name, "imageData": "x" * 99}
            write(folder / split / f"{entry.file.stem}.json", content)
    return {"train": folder / "train", "val": folder / "val"}


WRITERS = {"YOLO-seg": write_yolo, "masks": write_masks, "LabelMe": write_labelme}


@pytest.fixture(scope="module", params=WRITERS)
def written(request, toy_set, tmp_path_factory):
    return request.param, WRITERS[request.param](toy_set, tmp_path_factory.mktemp("set"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_toy_set_comes_back_bit_by_bit(written, toy_set, split, capsys):
    kind, paths = written
    dataset, original = read(paths[split], split=split), CocoSet(toy_set / f"{split}.json")
    said = capsys.readouterr().err
    assert f"{paths[split]}: {kind}, {len(original)} pictures, 4 classes" in said
    assert len(said.splitlines()) == 1
    assert dataset.path == paths[split]
    assert not dataset.skipped
    names = [category.name for category in dataset.categories]
    # Ids: class indices for YOLO, else 1.. in sorted order.
    first = 0 if kind == "YOLO-seg" else 1
    assert [category.id for category in dataset.categories] == list(range(first, first + 4))
    assert kind == "YOLO-seg" or names == sorted(names)
    assert [p.file.name for p in dataset.pictures] == [p.file.name for p in original.pictures]
    assert [p.id for p in dataset.pictures] == [p.file.name for p in original.pictures]
    for index in range(len(original)):
        assert torch.equal(read_labelled(dataset, index), read_labelled(original, index))

        def objects(of, index=index):
            labels = of.target(index).labels.tolist()
            found = zip(labels, dense(of, index), strict=True)
            return sorted((of.categories[label].name, mask.tobytes()) for label, mask in found)

        assert len(objects(original)) > 0
        assert objects(dataset) == objects(original)


def test_every_format_trains_and_evaluates(written, tmp_path, monkeypatch, capsys):
    kind, paths = written
    monkeypatch.chdir(tmp_path)
    tiny_recipe("mask_rcnn").save("tiny.yaml")
    settings = [f"--set=data.{split}={path}" for split, path in paths.items()]
    assert cli.main(["train", "tiny.yaml", *settings, "--out", "run"]) == 0
    assert f"{kind}, 4 pictures" in capsys.readouterr().err
    table = json.loads(Path("run/categories.json").read_text())
    assert sorted(row["name"] for row in table) == ["cloud", "gear", "leaf", "star"]
    assert "mask/AP" in json.loads(Path("run/evaluation.json").read_text())["values"]
    assert cli.main(["evaluate", "run/best", "--data", str(paths["val"]), "--limit", "1"]) == 0
    dataset = read(paths["val"])
    photo = str(dataset.pictures[1].file)
    options = ["--data", str(paths["val"]), "--threshold", "0", "--save", "coco"]
    assert cli.main(["predict", "run/best", photo, *options]) == 0
    records = json.loads(Path("predictions/predictions.json").read_text())
    assert {record["image_id"] for record in records} <= {dataset.pictures[1].id}
    capsys.readouterr()
    assert cli.main(["info", "tiny.yaml", *settings, "--size", "64x96"]) == 0
    assert ", 4 classes," in capsys.readouterr().out


# --- YOLO-seg


@pytest.fixture
def yolo_set(tmp_path):
    """Two pictures, one without a label file."""
    folder = tmp_path / "set"
    picture(folder / "images" / "a.jpg")
    picture(folder / "images" / "b.png")
    write(folder / "labels" / "a.txt", yolo_line(1, [(2, 3), (20, 3), (20, 9), (2, 9)]) + "\n\n")
    return folder


def test_yolo_polygons_are_drawn_as_pycocotools_draws_them(yolo_set):
    random = np.random.default_rng(0)
    polygons = [random.uniform((0, 0), SIZE[::-1], (9, 2)) for _ in range(5)]
    # An outline that is tied to one run the other way round inside: a hole.
    ring = [(5, 5), (30, 5), (30, 30), (5, 30), (5, 5), (10, 10), (10, 20), (20, 20), (20, 10)]
    polygons.append(np.array([*ring, (10, 10), (5, 5)], dtype=float))
    lines = [yolo_line(k, p) for k, p in enumerate(polygons)]
    write(yolo_set / "labels" / "a.txt", "\n".join(lines))
    dataset = read(yolo_set)
    assert dataset.target(0).labels.tolist() == list(range(6))
    for mask, points in zip(dense(dataset), polygons, strict=True):
        (rle,) = coco_mask.frPyObjects([points.reshape(-1).tolist()], *SIZE)
        assert (mask == coco_mask.decode(rle)).all()
    hole = np.zeros(SIZE, np.uint8)
    hole[5:30, 5:30] = 1
    hole[10:20, 10:20] = 0
    assert (dense(dataset)[5] == hole).all()


def test_labels_of_a_picture_called_classes_are_no_names(yolo_set):
    picture(yolo_set / "images" / "classes.png")
    line = yolo_line(1, [(2, 3), (20, 3), (20, 9), (2, 9)])
    write(yolo_set / "labels" / "classes.txt", line)
    write(yolo_set / "data.yaml", "train: images\nval: images\nnames: [cat, dog]\n")
    for path in (yolo_set, yolo_set / "data.yaml"):
        dataset = read(path)
        assert [c.name for c in dataset.categories] == ["cat", "dog"]
        assert [len(dataset.target(index)) for index in range(3)] == [1, 0, 1]


def test_yolo_folder_without_names(yolo_set, capsys):
    dataset = read(yolo_set)
    assert [tuple(category) for category in dataset.categories] == [(0, "0"), (1, "1")]
    assert [p.id for p in dataset.pictures] == ["a.jpg", "b.png"]
    assert [len(dataset.target(index)) for index in (0, 1)] == [1, 0]
    expected = np.zeros(SIZE, np.uint8)
    expected[3:9, 2:20] = 1
    assert (dense(dataset)[0] == expected).all()
    assert "1 pictures without labels" in capsys.readouterr().err
    write(yolo_set / "labels" / "stray.txt", "")
    write(yolo_set / "labels" / "classes.txt", "cat\ndog\n")
    assert [c.name for c in read(yolo_set / "labels").categories] == ["cat", "dog"]
    assert "1 label files without a picture" in capsys.readouterr().err
    assert [c.name for c in read(yolo_set / "images").categories] == ["cat", "dog"]


@pytest.mark.parametrize("train", ["images", ["images"], "list.txt", "../images"])
def test_yolo_yaml_finds_the_pictures(yolo_set, train):
    write(yolo_set / "list.txt", "./images/a.jpg\nimages/b.png\n")
    write(yolo_set / "data.yaml", json.dumps({"names": {"0": "x"}, "train": train}))
    refused(yolo_set / "data.yaml", "names: index '0'", split="train")
    text = f"names: {{0: cat, 1: dog, 7: cow}}\ntrain: {json.dumps(train)}\n"
    write(yolo_set / "data.yaml", text)
    dataset = read(yolo_set / "data.yaml", split="train")
    assert [c.id for c in dataset.categories] == [0, 1, 7]
    assert [p.file.name for p in dataset.pictures] == ["a.jpg", "b.png"]
    assert dataset.target(0).labels.tolist() == [1]
    refused(yolo_set / "data.yaml", "data.yaml: val: ", split="val")
    assert [c.name for c in read(yolo_set).categories] == ["cat", "dog", "cow"]


BOX = "0.1 0.1 0.5 0.1 0.5 0.5"
LINES = {
    "0 0.5 0.5 0.2 0.2": "a box without a polygon",
    "0 0.1 0.1 0.5": "an odd number of coordinates",
    "0 0.1 0.1 0.5 0.1 0.5 0.5 0.3": "an odd number of coordinates",
    "0": "0 coordinates",
    "0 0.1 0.1": "2 coordinates",
    f"cat {BOX}": "'cat' is no finite number",
    f"0,{BOX}": "'0,0.1' is no finite number",
    f"1.5 {BOX}": "class 1.5",
    f"-1 {BOX}": "class -1",
    f"nan {BOX}": "'nan' is no finite number",
    "0 0.1 0.1 0.5 inf 0.5 0.5": "'inf' is no finite number",
    "0 12 30 100 30 100 200": "coordinate 12, expected shares",
    "0 0.1 -0.2 0.5 0.1 0.5 0.5": "coordinate -0.2",
    f"2 {BOX}": "class 2, but the names are those of 0 to 1",
}


@pytest.mark.parametrize("line", LINES)
def test_a_broken_yolo_line_is_named(yolo_set, line):
    write(yolo_set / "classes.txt", "cat\ndog\n")
    write(yolo_set / "labels" / "a.txt", f"0 {BOX}\n\n{line}\n")
    refused(yolo_set, yolo_set / "labels" / "a.txt", ": line 3: ", LINES[line])


def test_a_polygon_outside_of_the_picture_costs_itself_only(yolo_set, capsys):
    off = "1 1.05 0.1 1.09 0.1 1.09 0.5"
    write(yolo_set / "labels" / "a.txt", f"0 {BOX}\n{off}\n")
    dataset = read(yolo_set)
    assert len(dataset.target(0)) == 1
    assert "line 2 of a.txt" in dataset.skipped[0]
    assert "1 unusable, first: annotation line 2 of a.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("names: [a", "line 1, column 10: no valid YAML"),
        ("- a", "expected a YOLO data yaml"),
        ("train: images\nval: images", "names: expected"),
        ("names: []\nval: images", "names: expected"),
        ("names: [a, null]\nval: images", "names: class 1 has no name"),
        ("names: {-1: a}\nval: images", "names: index -1"),
        ("names: [a, b]", "val: expected a folder"),
        ("names: [a, b]\nval: [images, 3]", "val: expected a folder"),
        ("names: [a, b]\nval: gone", "no such folder or list"),
        ("names: [a, b]\nval: images\npath: 3", "path: expected a folder"),
        ("names: [a]\nval: images", "a.txt: line 1: class 1"),
        ("names: [a, b]\nval: list.txt", "list.txt: line 2: images/gone.png"),
        ("names: [a, b]\nval: none.txt", "none.txt: lists no picture"),
        ("names: [a, b]\nval: labels", "labels: no pictures there"),
        ("names: [a, \xff]".encode("latin1"), "no text in UTF-8"),
    ],
)
def test_a_broken_yaml_is_one_line(yolo_set, content, part):
    write(yolo_set / "list.txt", "images/a.jpg\nimages/gone.png\n")
    write(yolo_set / "none.txt", "\n")
    content = content if isinstance(content, bytes) else content.encode()
    (yolo_set / "set.yaml").write_bytes(content)
    refused(yolo_set / "set.yaml", part)


def test_the_last_folder_named_images_counts(tmp_path):
    top = tmp_path / "images" / "set"
    picture(top / "images" / "train" / "a.jpg")
    write(top / "labels" / "train" / "a.txt", f"0 {BOX}")
    write(top / "set.yaml", "names: [a]\ntrain: images/train\npath: .")
    for path in (top / "images" / "train", top / "labels" / "train", top / "set.yaml"):
        dataset = read(path, split="train")
        assert [(p.id, len(dataset.target(0))) for p in dataset.pictures] == [("a.jpg", 1)]


def test_yolo_sets_that_are_doubtful(yolo_set, tmp_path):
    refused(tmp_path / "none.yaml", "none.yaml: no such file")
    write(yolo_set / "set.yaml", "names: [a, b]\nval: images")
    refused(yolo_set / "set.yaml", "leave out the folder", images=yolo_set / "images")
    picture(yolo_set / "images" / "a.png")
    refused(yolo_set, "a.png: its labels would be those of a.jpg")
    (yolo_set / "images" / "a.png").write_text("no picture")
    (yolo_set / "images" / "a.jpg").unlink()
    refused(yolo_set, "a.png: no picture")
    (yolo_set / "labels" / "a.txt").unlink()
    refused(yolo_set, "no picture has a label file", yolo_set / "labels" / "a.txt")
    for split in ("train", "val"):
        picture(yolo_set / "images" / split / "c.png")
    refused(yolo_set, "holds train and val: name one")


def test_coordinates_belong_to_the_upright_picture(yolo_set):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.png"):
        picture(yolo_set / "images" / name, (SIZE[1], SIZE[0]), exif=exif)
    dataset = read(yolo_set)
    for index in (0, 1):
        assert dataset.pictures[index].size == SIZE
        assert read_labelled(dataset, index).shape[1:] == SIZE
    assert dense(dataset)[0][3:9, 2:20].all()


# --- masks


def test_a_png_may_say_behind_its_pixels_how_it_is_turned(tmp_path):
    tag = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)
    chunk = struct.pack(">I", len(tag)) + b"eXIf" + tag
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    picture(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "late.png").write_bytes(whole[:-12] + chunk + whole[-12:])
    (tmp_path / "early.png").write_bytes(whole[:33] + chunk + whole[33:])
    assert upright_size(tmp_path / "a.png") == SIZE
    for name in ("late.png", "early.png"):
        assert upright_size(tmp_path / name) == SIZE[::-1]
        assert read_rgb(tmp_path / name).shape[:2] == SIZE[::-1]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_id_maps_split_into_what_was_drawn(tmp_path, dtype):
    random = np.random.default_rng(1)
    values = np.array([0, 1, 2, 255] if dtype == np.uint8 else [0, 1, 256, 257, 40000, 65535])
    ids = random.choice(values, SIZE, p=[0.5] + [0.5 / (len(values) - 1)] * (len(values) - 1))
    ids[10:30, 10:30] = values[1]
    ids[15:20, 15:20] = 0  # a hole
    ids[:, -1] = values[2]  # runs that go on from column to column and to the last pixel
    save_ids(tmp_path / "masks" / "deep" / "a.b.png", ids.astype(dtype))
    picture(tmp_path / "images" / "deep" / "a.b.jpg")
    dataset = read(tmp_path)
    assert [tuple(c) for c in dataset.categories] == [(1, "object")]
    assert [p.id for p in dataset.pictures] == ["deep/a.b.jpg"]
    found = dense(dataset)
    assert len(found) == len(values) - 1
    for mask, value in zip(found, values[1:], strict=True):
        assert (mask == (ids == value)).all()
    assert dataset.ground_truth()["annotations"][0]["area"] == (ids == values[1]).sum()


def test_split_ids_of_every_small_map():
    random = np.random.default_rng(2)
    for _ in range(300):
        ids = random.integers(0, random.integers(1, 5), random.integers(1, 6, 2))
        split = dict(masks_folder.split_ids(ids.astype(np.uint8)))
        assert list(split) == [value for value in np.unique(ids) if value]
        for value, runs in split.items():
            whole = coco_mask.decode(runs.encode())
            assert (whole == (ids == value)).all()
            assert runs.area() == (ids == value).sum()
            window, (x, y) = runs.window()
            assert (window.numpy() == whole[y : y + len(window), x : x + window.shape[1]]).all()


def test_palettes_and_bits(tmp_path):
    ids = np.zeros(SIZE, np.uint8)
    ids[3:9, 4:8], ids[20:30, 4:50] = 1, 2
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "b.png")
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.reshape(-1).tolist())
    palette.putpalette([0, 0, 0, 255, 0, 0, 255, 0, 0])  # two ids of one colour
    (tmp_path / "masks").mkdir()
    palette.save(tmp_path / "masks" / "a.png")
    Image.fromarray(ids > 0).save(tmp_path / "masks" / "b.png")
    dataset = read(tmp_path)
    assert (dense(dataset, 0) == np.stack([ids == 1, ids == 2])).all()
    assert (dense(dataset, 1) == (ids > 0)).all()


def test_files_of_single_objects(tmp_path, capsys):
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "images" / "none.jpg")
    masks = np.zeros((4, *SIZE), np.uint8)
    masks[0, 5:20, 5:20], masks[1, 10:30, 10:30], masks[2, 0:3, 0:50] = 255, 7, 1  # overlapping
    masks[1, 12:14, 12:14], masks[1, 15:17, 15:17] = 0, 200  # a hole; another value
    for name, mask in zip(["red_cell_01", "dot_2", "3", "dot_9"], masks, strict=True):
        save_ids(tmp_path / "masks" / "a" / f"{name}.png", mask)
    save_ids(tmp_path / "masks" / "stray.png", masks[0])
    dataset = read(tmp_path)
    assert [tuple(c) for c in dataset.categories] == [(1, "dot"), (2, "object"), (3, "red_cell")]
    assert dataset.target(0).labels.tolist() == [1, 0, 2]  # files in sorted order
    assert (dense(dataset) == (masks[[2, 1, 0]] > 0)).all()
    assert "annotation a/dot_9.png: the mask holds no pixel" in dataset.skipped[0]
    said = capsys.readouterr().err
    assert "1 pictures without labels, 1 label files without a picture, 1 unusable" in said
    write(tmp_path / "classes.txt", "dot\nobject\nred_cell\nzebra\n")
    assert [c.name for c in read(tmp_path / "masks").categories][-1] == "zebra"
    write(tmp_path / "classes.txt", "dot\nobject\n")
    refused(tmp_path, "class 'red_cell' is not in classes.txt")
    write(tmp_path / "classes.txt", "dot\ndot\n")
    refused(tmp_path, "classes.txt: names 'dot' twice")
    write(tmp_path / "classes.txt", "\n")
    refused(tmp_path, "classes.txt: holds no class name")


def test_masks_of_other_kinds_are_named_and_not_taken_for_nothing(tmp_path):
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.jpg")
    ids = np.zeros(SIZE, np.uint8)
    ids[5:9, 5:9] = 1
    save_ids(tmp_path / "masks/a/cell_01.png", ids)
    save_ids(tmp_path / "masks/b.png", ids)
    (tmp_path / "masks/b.png").rename(tmp_path / "masks/b.PNG")
    dataset = read(tmp_path)
    assert [len(dataset.target(index)) for index in range(3)] == [1, 1, 0]
    for name in ("a/cell_02.tif", "c.bmp"):
        file = tmp_path / "masks" / name
        Image.fromarray(ids).save(file)
        refused(tmp_path, file, "masks are PNG files, and this is none")
        file.unlink()


def test_masks_that_are_doubtful(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    mask = tmp_path / "masks" / "a.png"
    mask.parent.mkdir()
    refused(tmp_path, "no picture has masks", mask)
    Image.new("RGB", SIZE[::-1]).save(mask)
    refused(tmp_path, mask, "has colours (RGB)")
    Image.new("L", SIZE).save(mask)
    refused(tmp_path, mask, "60 x 40 pixels", "has 40 x 60", "turned upright?")
    Image.new("L", (60, 41)).save(mask)
    assert "upright" not in refused(tmp_path, mask, "41 x 60 pixels", "has 40 x 60")
    mask.write_bytes(b"no picture")
    refused(tmp_path, mask, "no picture")
    Image.new("L", SIZE[::-1]).save(mask)
    mask.write_bytes(mask.read_bytes()[:60])
    refused(tmp_path, mask, "cannot read")
    mask.with_suffix("").mkdir()
    refused(tmp_path, mask, "there is a folder a, too")


# --- LabelMe


def labelme(folder, *shapes, name="a", **more):
    picture(folder / f"{name}.png")
    write(folder / f"{name}.json", {"shapes": list(shapes), "imagePath": f"{name}.png", **more})


def test_labelme_shapes(tmp_path):
    random = np.random.default_rng(3)
    outline = random.uniform((0, 0), SIZE[::-1], (7, 2))
    labelme(
        tmp_path,
        shape("zoo", outline.tolist()),
        shape("ant", [(20, 9), (2, 3)], "rectangle", 1),
        shape("ant", [(30, 20), (40, 20), (40, 30), (30, 30)], None, 1),
        shape("bee", [(5, 30), (8, 36)], "rectangle", 1),  # the same group, another label
        shape("ant", [(50, 30), (55, 35)], "rectangle"),
        shape("sun", [(30, 20), (30, 35)], "circle"),
        imageHeight=SIZE[0],
        imageWidth=SIZE[1],
    )
    dataset = read(tmp_path)
    assert [tuple(c) for c in dataset.categories] == [
        (1, "ant"),
        (2, "bee"),
        (3, "sun"),
        (4, "zoo"),
    ]
    assert dataset.target(0).labels.tolist() == [3, 0, 1, 0, 2]
    found = dense(dataset)
    (rle,) = coco_mask.frPyObjects([outline.reshape(-1).tolist()], *SIZE)
    assert (found[0] == coco_mask.decode(rle)).all()
    two, one, last = np.zeros((3, *SIZE), np.uint8)
    two[3:9, 2:20] = two[20:30, 30:40] = one[30:36, 5:8] = last[30:35, 50:55] = 1
    assert (found[1:4] == np.stack([two, one, last])).all()
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    away = np.hypot(x - 30, y - 20)
    assert found[4][away < 14.2].all()
    assert not found[4][away > 15.8].any()
    assert found[4].sum() == pytest.approx(np.pi * 15**2, rel=0.01)


def test_labelme_paths(tmp_path):
    corners = [(1, 1), (9, 9)]
    labelme(tmp_path / "photos", name="p")
    folder = tmp_path / "labels_of_bob"
    content = {"shapes": [shape("a", corners, "rectangle")], "imagePath": "..\\photos\\p.png"}
    write(folder / "deep" / "x.json", {**content, "imagePath": "..\\..\\photos\\p.png"})
    dataset = read(folder)
    assert dataset.pictures[0].file == tmp_path / "photos" / "p.png"
    assert read_labelled(dataset, 0).shape[1:] == SIZE
    single = read(folder / "deep" / "x.json")
    assert (dense(single) == dense(dataset)).all()
    write(folder / "deep" / "x.json", {**content, "imagePath": "p.png"})
    moved = read(folder, images=tmp_path / "photos")
    assert [p.id for p in moved.pictures] == ["p.png"]
    refused(folder, "p.png: no such picture")
    write(folder / "y.json", {**content, "imagePath": "p.png"})
    refused(folder, "y.json: imagePath: p.png has labels", images=tmp_path / "photos")
    refused(folder, "none: no such folder", images="none")


TRIANGLE = [(1, 1), (9, 1), (9, 9)]
SHAPES = [
    (7, "expected an object"),
    (shape(None, TRIANGLE), "label: expected a text"),
    (shape(" ", TRIANGLE), "label: expected a text"),
    (shape("a", TRIANGLE, group=1.5), "group_id: expected"),
    (shape("a", TRIANGLE, "line"), "shape_type 'line': expected polygon, rectangle or circle"),
    (shape("a", TRIANGLE, "mask"), "shape_type 'mask'"),
    (shape("a", TRIANGLE[:2]), "a polygon of 2 points"),
    (shape("a", []), "a polygon of 0 points"),
    (shape("a", TRIANGLE, "rectangle"), "a rectangle of 3 points"),
    (shape("a", TRIANGLE, "circle"), "a circle of 3 points"),
    (shape("a", [(3, 3), (3, 3)], "circle"), "a circle of radius 0"),
    (shape("a", [*TRIANGLE, (1, 2, 3)]), "points: expected a list of [x, y]"),
    (shape("a", [*TRIANGLE, (1, "2")]), "not a finite number"),
    (shape("a", [*TRIANGLE, (1, float("nan"))]), "not a finite number"),
    (shape("a", [*TRIANGLE, (1, True)]), "not a finite number"),
    ({"label": "a", "points": None}, "points: expected a list"),
]


@pytest.mark.parametrize(("broken", "part"), SHAPES, ids=[part for _, part in SHAPES])
def test_a_broken_shape_is_named(tmp_path, broken, part):
    labelme(tmp_path, shape("a", TRIANGLE), broken)
    refused(tmp_path, tmp_path / "a.json", ": shapes[1]: ", part)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"shapes": {}}, "shapes: expected a list"),
        ({"imagePath": None}, "imagePath: expected"),
        ({"imageHeight": "40", "imageWidth": 60}, "imageHeight and imageWidth: expected whole"),
        ({"imageHeight": 40}, "imageHeight and imageWidth: expected whole"),
        ({"imageHeight": 10**6, "imageWidth": 10**6}, "too large"),
        ({"imagePath": "gone.png"}, "gone.png: no such picture"),
    ],
)
def test_a_broken_labelme_json_is_named(tmp_path, change, part):
    labelme(tmp_path, shape("a", TRIANGLE), **change)
    refused(tmp_path, part)


def test_labelme_of_another_size_than_its_picture(tmp_path):
    labelme(tmp_path, shape("a", TRIANGLE), imageHeight=SIZE[1], imageWidth=SIZE[0])
    dataset = read(tmp_path)
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        read_labelled(dataset, 0)


# --- which format


def test_coco_is_read_as_ever_and_not_announced(toy_set, capsys):
    dataset = read(toy_set / "train.json")
    original = CocoSet(toy_set / "train.json")
    assert list(dataset.pictures) == list(original.pictures)
    assert dataset.categories == original.categories
    assert dataset.path == original.path
    assert not capsys.readouterr().err
    elsewhere = read(toy_set / "train.json", images=toy_set)
    assert elsewhere.pictures[0].file.parent == toy_set


def test_what_is_no_set_or_two(tmp_path, toy_set, yolo_set):
    refused(tmp_path / "none", "none: no such annotation file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty: no labels known: expected a json")
    refused(toy_set, "holds train.json, which is not LabelMe's: name the COCO json")
    (yolo_set / "masks").mkdir()
    refused(yolo_set, "holds both labels and masks: name the folder of one of them")
    assert len(read(yolo_set / "labels")) == 2
    refused(yolo_set / "masks", "no picture has masks")
    labelme(tmp_path / "mixed", shape("a", TRIANGLE))
    write(tmp_path / "mixed" / "coco.json", {"images": []})
    refused(tmp_path / "mixed", "coco.json: shapes: expected a list")
    for name in ("images", "labels"):
        (tmp_path / "bare" / name).mkdir(parents=True)
    refused(tmp_path / "bare", "no pictures there")
    (tmp_path / "broken").mkdir()
    write(tmp_path / "broken" / "a.json", "{")
    refused(tmp_path / "broken", "a.json: line 1: no valid json")


def test_training_refuses_classes_that_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labelme(tmp_path / "train", shape("a", TRIANGLE), shape("b", TRIANGLE))
    labelme(tmp_path / "val", shape("b", TRIANGLE))
    tiny_recipe(data={"train": "train", "val": "val"}).save("tiny.yaml")
    assert cli.main(["train", "tiny.yaml"]) == 2
    assert "val: its categories differ from those of train" in capsys.readouterr().err
    write(tmp_path / "classes.txt", "a\nb\n")  # beside both
    assert [c.name for c in read("val").categories] == ["a", "b"]


def test_a_list_of_pictures_is_relative_to_itself_or_to_the_set(yolo_set):
    write(yolo_set / "lists" / "val.txt", "../images/b.png\nimages/a.jpg\n")
    write(yolo_set / "set.yaml", "names: [cat, dog]\nval: lists/val.txt")
    dataset = read(yolo_set / "set.yaml")
    assert [p.id for p in dataset.pictures] == ["images/b.png", "images/a.jpg"]
    assert [len(dataset.target(index)) for index in (0, 1)] == [0, 1]


def test_empty_masks_still_have_their_class(tmp_path):
    picture(tmp_path / "images" / "a.png")
    save_ids(tmp_path / "masks" / "a.png", np.zeros(SIZE, np.uint8))
    dataset = read(tmp_path)
    assert [tuple(category) for category in dataset.categories] == [(1, "object")]
    assert len(dataset.target(0)) == 0
