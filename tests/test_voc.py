from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from brefine.data import voc
from brefine.data.loader import read_labelled
from brefine.data.read import read
from brefine.structures import InputError

SIZE = 40, 60  # height, width
LISTS = {"train": ["2007_000001", "2008_000002"], "val": ["2009_000003", "2007_000004", "2011_5"]}


def save(path, values):
    """A palette PNG, as the official ones are."""
    image = Image.fromarray(values, "L").convert("P")
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette([(37 * i + k) % 256 for i in range(256) for k in range(3)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def draw(random, count):
    """Object values and class values of one picture; a seam of void around each object."""
    objects, classes = np.zeros((2, *SIZE), np.uint8)
    for number in range(1, count + 1):
        y, x = random.integers(0, 30), random.integers(0, 50)
        h, w = random.integers(4, 20, 2)
        for part in (objects, classes):
            part[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1] = 255
        objects[y : y + h, x : x + w] = number
        classes[y : y + h, x : x + w] = random.integers(1, 21)
    return objects, classes


def write(root, seed=0):
    """A set in the official layout; the last picture has no objects."""
    random = np.random.default_rng(seed)
    maps = {}
    for split, names in LISTS.items():
        file = root / "ImageSets/Segmentation" / f"{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            (root / "JPEGImages").mkdir(exist_ok=True)
            Image.new("RGB", SIZE[::-1], (100 * number, 0, 0)).save(root / f"JPEGImages/{name}.jpg")
            maps[name] = draw(random, 0 if name == "2011_5" else 8)
            for kind, values in zip(("Object", "Class"), maps[name], strict=True):
                save(root / f"Segmentation{kind}" / f"{name}.png", values)
    # A picture that no list names: it has boxes only.
    Image.new("RGB", SIZE[::-1]).save(root / "JPEGImages/2012_000009.jpg")
    (root / "Annotations").mkdir(exist_ok=True)
    return maps


def check(dataset, maps, names):
    """Every picture and mask, from the definition."""
    assert [p.id for p in dataset.pictures] == [f"{name}.jpg" for name in names]
    for index, name in enumerate(names):
        objects, classes = maps[name]
        values = [value for value in np.unique(objects).tolist() if value not in (0, 255)]
        assert [
            (entry["category_id"], entry["id"], entry.get("iscrowd", 0))
            for entry in dataset.annotations(index)
        ] == [
            (
                int(np.bincount(classes[objects == value]).argmax()),
                f"value {value} of {name}.png",
                0,
            )
            for value in values
        ]
        target = dataset.target(index)
        assert np.array_equal(
            target.masks.dense(SIZE).numpy(),
            np.array([objects == value for value in values]).reshape(-1, *SIZE),
        )
        assert dataset.pictures[index].file.is_absolute()
        assert abs(int(read_labelled(dataset, index)[0, 0, 0]) - 100 * index) <= 3


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("inside", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_the_set_is_read_from_its_folder_or_one_around(tmp_path, inside, split, capsys):
    maps = write(tmp_path / inside)
    dataset = read(tmp_path, split=split)
    count = len(LISTS[split])
    assert capsys.readouterr().err == f"{tmp_path}: Pascal VOC, {count} pictures, 20 classes\n"
    check(dataset, maps, LISTS[split])
    assert not dataset.skipped
    assert [category.id for category in dataset.categories] == list(range(1, 21))
    names = [category.name for category in dataset.categories]
    assert names == sorted(names)
    assert names[0] == "aeroplane"
    assert names[19] == "tvmonitor"


def test_the_class_is_the_most_frequent_one(tmp_path):
    maps = write(tmp_path)
    objects, classes = np.zeros((2, *SIZE), np.uint8)
    objects[:10, :10], objects[20:30, 20:30] = 7, 254
    classes[:10, :10], classes[20:30, 20:30] = 3, 20
    classes[:4, :10] = 4  # 40 of 100 pixels
    classes[20:24, 20:30] = 255
    maps["2009_000003"] = objects, classes
    save(tmp_path / "SegmentationObject/2009_000003.png", objects)
    save(tmp_path / "SegmentationClass/2009_000003.png", classes)
    dataset = read(tmp_path, quiet=True)
    assert [entry["category_id"] for entry in dataset.annotations(0)] == [3, 20]
    check(dataset, maps, LISTS["val"])


def test_pictures_may_lie_elsewhere_and_be_png(tmp_path):
    maps = write(tmp_path / "VOC2012")
    (tmp_path / "photos").mkdir()
    for file in (tmp_path / "VOC2012/JPEGImages").iterdir():
        Image.open(file).save(tmp_path / "photos" / f"{file.stem}.png")
        file.unlink()
    (tmp_path / "VOC2012/JPEGImages").rmdir()
    dataset = read(tmp_path / "VOC2012", tmp_path / "photos", quiet=True)
    assert [p.file.name for p in dataset.pictures] == [f"{name}.png" for name in LISTS["val"]]
    for index, name in enumerate(LISTS["val"]):
        masks = dataset.target(index).masks.dense(SIZE).numpy()
        objects = maps[name][0]
        assert np.array_equal(masks.any(0), (objects != 0) & (objects != 255))


def test_places_name_what_an_annotation_was_read_from(tmp_path):
    write(tmp_path)
    content = voc.read(tmp_path)
    assert len(content["annotations"]) == len(content["info"]["places"]) > 10
    for entry, (file, value, words) in zip(
        content["annotations"], content["info"]["places"], strict=True
    ):
        assert file.parent == tmp_path / "SegmentationObject"
        assert entry["id"] == f"{words} of {file.name}"
        mask = coco_mask.decode(entry["segmentation"]).astype(bool)
        assert np.array_equal(mask, np.asarray(Image.open(file)) == value)


# --- faults


def refuse(path, message, **options):
    with pytest.raises(InputError) as caught:
        read(path, **options)
    assert str(caught.value) == message


def test_what_is_missing_as_a_whole_is_said(tmp_path):
    root = tmp_path / "VOC2012"
    write(root)
    lists = root / "ImageSets/Segmentation"
    (lists / "val.txt").unlink()
    there = "no such list of pictures, there are: train.txt"
    refuse(root, f"{lists}/val.txt: {there}")
    (lists / "val.txt").write_text("\n \n")
    refuse(tmp_path, f"{lists}/val.txt: lists no picture")
    (lists / "val.txt").write_bytes(b"\xff\xfe\x00")
    refuse(root, f"{lists}/val.txt: no text in UTF-8")
    for name, hint in (
        ("JPEGImages", ""),
        ("SegmentationClass", ""),
        ("SegmentationObject", ": boxes (Annotations) are not enough"),
    ):
        (root / name).rename(root / "hidden")
        refuse(root, f"{root}: no folder {name}{hint}")
        (root / "hidden").rename(root / name)
    write(tmp_path / "VOC2007")
    refuse(tmp_path, f"{tmp_path}: holds VOC2007 and VOC2012: name one, such as {root}")


LIST, NAME = Path("ImageSets/Segmentation/val.txt"), "2007_000004"
JPEG, OBJECTS, CLASSES = (
    Path(f"JPEGImages/{NAME}.jpg"),
    Path(f"SegmentationObject/{NAME}.png"),
    Path(f"SegmentationClass/{NAME}.png"),
)


def remove(file):
    return lambda root: (root / file).unlink()


def garble(file):
    return lambda root: (root / file).write_text("x")


def add(line):
    return lambda root: (root / LIST).write_text((root / LIST).read_text() + line)


def put(file, values):
    return lambda root: save(root / file, values)


def colour(file):
    return lambda root: Image.new("RGB", SIZE[::-1]).save(root / file)


def classes_are(number):
    return put(CLASSES, np.full(SIZE, number, np.uint8))


def one_object(root):
    save(root / OBJECTS, np.eye(*SIZE, dtype=np.uint8))


UNREADABLE = "no picture, or of a format that Pillow cannot read"
#: how to break it, kind, file, id, message with ROOT for the folder, pictures that remain
BROKEN = {
    "no picture": (
        remove(JPEG), "missing-picture", LIST, 2, f"line 2: {NAME}.jpg is not in ROOT/JPEGImages", 2
    ),
    "a line with two words": (
        add("2007_000001 1\n"), "missing-picture", LIST, 4,
        "line 4: 2007_000001 1.jpg is not in ROOT/JPEGImages", 3,
    ),
    "a picture of nowhere": (
        add("/2007\0\n"), "missing-picture", LIST, 4,
        "line 4: /2007\0.jpg is not in ROOT/JPEGImages", 3,
    ),
    "a picture twice": (
        add(f"{NAME}\n"), "duplicate-picture-id", LIST, 4, f"line 4: {NAME} is listed twice", 3
    ),
    "a broken picture": (garble(JPEG), "unreadable-picture", JPEG, f"{NAME}.jpg", UNREADABLE, 2),
    "no objects": (
        remove(OBJECTS), "no-labels", JPEG, f"{NAME}.jpg",
        f"has no SegmentationObject, expected ROOT/{OBJECTS}", 2,
    ),
    "no classes": (
        remove(CLASSES), "no-labels", JPEG, f"{NAME}.jpg",
        f"has no SegmentationClass, expected ROOT/{CLASSES}", 2,
    ),
    "broken objects": (garble(OBJECTS), "unreadable-mask", OBJECTS, None, UNREADABLE, 2),
    "broken classes": (garble(CLASSES), "unreadable-mask", CLASSES, None, UNREADABLE, 2),
    "objects in colours": (
        colour(OBJECTS), "colour-mask", OBJECTS, None,
        "has colours (RGB), expected one channel of 8 or 16 bits", 2,
    ),
    "classes in colours": (
        colour(CLASSES), "colour-mask", CLASSES, None,
        "has colours (RGB), expected one channel of 8 or 16 bits", 2,
    ),
    "objects of another size": (
        put(OBJECTS, np.zeros((20, 30), np.uint8)), "wrong-mask-size", OBJECTS, None,
        "20 x 30 pixels (height x width), but its picture has 40 x 60", 2,
    ),
    "turned classes": (
        put(CLASSES, np.zeros(SIZE[::-1], np.uint8)), "turned-mask", CLASSES, None,
        "60 x 40 pixels (height x width), but its picture has 40 x 60: was it drawn before the "
        "picture was turned upright?", 2,
    ),
    "an object of background": (
        lambda root: (one_object(root), classes_are(0)(root)), "unknown-category", OBJECTS, 1,
        "value 1: most of its pixels are 0 in SegmentationClass, expected a class id, 1 to 20", 3,
    ),
    "an object of void": (
        lambda root: (one_object(root), classes_are(255)(root)), "unknown-category", OBJECTS, 1,
        "value 1: most of its pixels are 255 in SegmentationClass, expected a class id, 1 to 20", 3,
    ),
    "an unknown class": (
        lambda root: (one_object(root), classes_are(21)(root)), "unknown-category", OBJECTS, 1,
        "value 1: most of its pixels are 21 in SegmentationClass, expected a class id, 1 to 20", 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_one_line_and_the_rest_is_read(tmp_path, name):
    break_it, kind, file, number, message, remain = BROKEN[name]
    maps = write(tmp_path)
    break_it(tmp_path)
    message = message.replace("ROOT", str(tmp_path))
    refuse(tmp_path, f"{tmp_path / file}: {message}")
    found = []
    content = voc.read(tmp_path, report=lambda *fault: found.append(fault))
    assert found == [(kind, tmp_path / file, number, message)]
    assert len(content["images"]) == remain
    objects = maps["2009_000003"][0]
    kept = [a for a in content["annotations"] if a["image_id"] == "2009_000003.jpg"]
    assert len(kept) == len(set(np.unique(objects)) - {0, 255})
    if kind == "unknown-category":
        assert kept == content["annotations"]
