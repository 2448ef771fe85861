"""Broken sets of every format but COCO: what is said of them, and that reading agrees."""

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import test_check
from brefine import cli
from brefine.data import faults
from brefine.data.check import check
from brefine.data.faults import KINDS, print_faults
from brefine.data.loader import read_labelled
from brefine.data.read import read
from brefine.structures import InputError, printable

HEIGHT, WIDTH = SIZE = 40, 60
NAMES = ("a", "b", "c")
CLASSES = ("cat", "dog")
#: x, y of the top left corners of objects of 9 x 9 pixels, the first half cats
PLACES = [(x, y) for y in (2, 22) for x in (2, 16, 30, 44)]

#: what costs an annotation in training, and what a picture, when it is its turn
SKIPPED = {"empty-mask", "outside-mask", "unknown-category"}
LATER = {
    "missing-picture", "unreadable-picture", "wrong-size", "swapped-size", "turned-picture",
}  # fmt: skip
#: what no reader can see
BEYOND = {"no-objects", "shifted-ids"}


# ------------------------------------------------------------------------- a set in each format


def save_picture(path: Path, seed: int, *, size: tuple[int, int] = SIZE, **options) -> None:
    """Blocks of noise: no two look alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    Image.fromarray(blocks).resize(size[::-1], Image.Resampling.NEAREST).save(path, **options)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def corners(x: float, y: float, side: float = 9) -> list[tuple[float, float]]:
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]


def line(index: int, points: list[tuple[float, float]]) -> str:
    return " ".join([str(index), *(f"{x / WIDTH} {y / HEIGHT}" for x, y in points)])


def shape(label: object, points: object, kind: object = "polygon", group: object = None) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": group}


def draw(values: list[int], dtype: type = np.uint8) -> np.ndarray:
    ids = np.zeros(SIZE, dtype)
    for (x, y), value in zip(PLACES, values, strict=False):
        ids[y : y + 9, x : x + 9] = value
    return ids


def save_mask(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(path)


def write_yolo(folder: Path) -> Path:
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            save_picture(folder / f"images/{split}/{name}.png", number + 10 * (split == "val"))
            lines = [line(i // 4, corners(*place)) for i, place in enumerate(PLACES)]
            write(folder / f"labels/{split}/{name}.txt", "\n".join(lines) + "\n")
    write(folder / "set.yaml", "names: [cat, dog]\ntrain: images/train\nval: images/val\n")
    return folder / "set.yaml"


def write_masks(folder: Path) -> Path:
    for number, name in enumerate(NAMES):
        save_picture(folder / f"images/{name}.png", number)
    save_mask(folder / "masks/a.png", draw(list(range(1, 9))))
    save_mask(folder / "masks/b.png", draw(list(range(300, 2700, 300)), np.uint16))
    for i in range(8):
        ids = draw([255 * (i == k) for k in range(8)])
        save_mask(folder / f"masks/c/object_{i}.png", ids)
    return folder


def write_labelme(folder: Path) -> Path:
    for number, name in enumerate(NAMES):
        save_picture(folder / f"{name}.png", number)
        shapes = [shape(CLASSES[i // 4], corners(*place)) for i, place in enumerate(PLACES)]
        content = {"imagePath": f"{name}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
        write(folder / f"{name}.json", content | {"shapes": shapes})
    return folder


def write_lvis(folder: Path) -> Path:
    images, annotations = [], []
    for number, name in enumerate(NAMES):
        save_picture(folder / f"images/{name}.png", number)
        images.append(
            {
                "id": number,
                "coco_url": f"http://host/train/{name}.png",
                "height": HEIGHT,
                "width": WIDTH,
                "neg_category_ids": [],
                "not_exhaustive_category_ids": [2],
            }
        )
        for i, place in enumerate(PLACES):
            polygon = [value for point in corners(*place) for value in point]
            annotations.append({"id": 8 * number + i, "image_id": number, "area": 81,
                                "bbox": [*place, 9, 9], "category_id": 1 + i // 4,
                                "segmentation": [polygon]})  # fmt: skip
    categories = [{"id": i, "name": name, "frequency": "r"} for i, name in enumerate(CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write(folder / "train.json", content)
    return folder / "train.json"


def write_cityscapes(folder: Path) -> Path:
    """All eight classes in each of twelve pictures."""
    ids = np.array([24, 25, 26, 27, 28, 31, 32, 33])
    for number in range(12):
        name = f"bonn_{number:06}_000019"
        save_picture(folder / f"leftImg8bit/train/bonn/{name}_leftImg8bit.png", number)
        labels = folder / f"gtFine/train/bonn/{name}_gtFine"
        if number < 6:
            save_mask(Path(f"{labels}_instanceIds.png"), draw((1000 * ids).tolist(), np.uint16))
        else:
            from brefine.data.cityscapes import NAMES as KNOWN

            objects = [
                {"label": KNOWN[i], "polygon": [list(p) for p in corners(*place, 8)]}
                for i, place in zip(ids, PLACES, strict=True)
            ]
            content = {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}
            write(Path(f"{labels}_polygons.json"), content)
    return folder


def write_voc(folder: Path) -> Path:
    """All twenty classes ten times."""
    write(folder / "ImageSets/Segmentation/train.txt", "".join(f"p{i}\n" for i in range(25)))
    for number in range(25):
        save_picture(folder / f"JPEGImages/p{number}.png", number)
        classes = [(8 * number + k) % 20 + 1 for k in range(8)]
        save_mask(folder / f"SegmentationObject/p{number}.png", draw(list(range(1, 9))))
        save_mask(folder / f"SegmentationClass/p{number}.png", draw(classes))
    return folder


WRITERS = {"yolo": write_yolo, "masks": write_masks, "labelme": write_labelme,
           "lvis": write_lvis, "cityscapes": write_cityscapes, "voc": write_voc}  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Folder of each clean set, and what to name inside it."""
    top = tmp_path_factory.mktemp("clean")
    return {
        name: (top / name, writer(top / name).relative_to(top / name).as_posix())
        for name, writer in WRITERS.items()
    }


def place_set(originals: dict, name: str, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of a set to break, and what to name in it."""
    folder, inside = originals[name]
    copy = Path(shutil.copytree(folder, tmp_path / "set"))
    return copy, copy / inside


def find(path: Path, **options) -> list:
    faults = check(path, progress=False, **options)
    for fault in faults:
        assert fault.message == " ".join(fault.message.split())
        assert fault.message
        assert (fault.severity, fault.advice) == KINDS[fault.kind]
    print_faults(faults, Console(file=io.StringIO(), width=60), examples=None)
    json.dumps([vars(fault) for fault in faults], allow_nan=False).encode()
    return faults


def read_all(path: Path, faults: list, split: str = "train") -> str:
    """What training does with a set, which must be what ``check`` said of it.

    Returns:
        ``refused``, ``skipped``: annotations, ``later``: a picture is of no use, or ``taken``.
    """
    errors = [fault for fault in faults if fault.severity == "error"]
    try:
        dataset = read(path, split=split, quiet=True)
    except InputError as error:
        text = str(error)
        assert "\n" not in text
        # The one line names the place: it is that of one of the faults.
        lines = {f"{f.file}{colon}{f.message}" for f in errors for colon in (": ", ", ")}
        assert text in lines | {f.message for f in errors if f.kind == "bad-set"}
        return "refused"
    skipped = [fault for fault in errors if fault.kind in SKIPPED]
    assert len(skipped) == len(dataset.skipped)
    broken = {fault.file for fault in errors if fault.kind in LATER}
    for index, picture in enumerate(dataset.pictures):
        if printable(str(picture.file)) in broken:
            name = re.escape(printable(picture.file.name))
            with pytest.raises(InputError, match=name) as caught:
                read_labelled(dataset, index)
            assert "\n" not in str(caught.value)
        else:
            read_labelled(dataset, index)
    assert {fault.kind for fault in errors} <= SKIPPED | LATER | BEYOND
    return "later" if broken else "skipped" if skipped else "taken"


@pytest.mark.parametrize("name", WRITERS)
def test_a_clean_set(originals: dict, name: str, tmp_path: Path) -> None:
    _, path = place_set(originals, name, tmp_path)
    faults = find(path)
    assert faults == []
    assert read_all(path, faults) == "taken"
    assert len(read(path, split="train", quiet=True)) == {"cityscapes": 12, "voc": 25}.get(name, 3)


# -------------------------------------------------------------------------------- the battery


@dataclass(frozen=True)
class Case:
    """What is broken, what is said of it (kind, file, id, words of the message), what follows."""

    name: str
    change: Callable[[Path], object]
    faults: list[tuple[str, str, object, str]]
    outcome: str
    path: str | None = None

    def __str__(self) -> str:
        return self.name


def at(file: str, value: object) -> Callable[[Path], None]:
    """Write the file."""
    return lambda folder: write(folder / file, value)


def gone(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def both(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes] and None


def cut(file: str, keep: int = -60) -> Callable[[Path], None]:
    """Keep the first bytes."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep]) and None


def raw(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(data) and None


def turn(file: str, orientation: int, size: tuple[int, int] = SIZE) -> Callable[[Path], None]:
    """The picture once more, stored at this size with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return lambda folder: save_picture(folder / file, 77, size=size, exif=exif)


def copy(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(folder / old, folder / new) and None


TXT, LINE = "labels/train/a.txt", 9  # the line that is added
BOX = "0.1 0.1 0.5 0.1 0.5 0.4"


def add(text: str) -> Callable[[Path], None]:
    """One line more in the labels of the first picture."""

    def change(folder: Path) -> None:
        with open(folder / TXT, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    return change


def yaml(text: str) -> Callable[[Path], None]:
    return at("set.yaml", text)


def shift(by: int) -> Callable[[Path], None]:
    """Other class indices in every label file of train."""

    def change(folder: Path) -> None:
        for name in NAMES:
            file = folder / f"labels/train/{name}.txt"
            lines = [row.split(" ", 1) for row in file.read_text().splitlines()]
            write(file, "\n".join(f"{int(index) + by} {rest}" for index, rest in lines))

    return change


def in_train(folder: Path) -> None:
    for name in NAMES:
        (folder / f"labels/train/{name}.txt").unlink()


def bad_line(name: str, text: str, kind: str, words: str, outcome: str = "refused") -> Case:
    return Case(name, add(text), [(kind, TXT, LINE, f"line {LINE}: {words}")], outcome)


A = "images/train/a.png"
#: what follows if one picture of three loses its labels
EMPTY = ("pictures-without-objects", ".", None, "1 of 3 pictures have no object")
FEW = [("rare-class", "set.yaml", 0, "(cat): only 8 objects"),
       ("rare-class", "set.yaml", 1, "(dog): only 8 objects"),
       ("pictures-without-objects", "set.yaml", None, "1 of 3 pictures")]  # fmt: skip
YOLO = [
    bad_line("box only", "0 0.5 0.5 0.2 0.2", "no-mask", "a box without a polygon"),
    bad_line("odd", "0 0.1 0.1 0.5", "bad-line", "an odd number of coordinates"),
    bad_line("nothing but a class", "0", "few-points", "0 coordinates"),
    bad_line("one point", "0 0.1 0.1", "few-points", "2 coordinates"),
    bad_line("a name for a class", f"cat {BOX}", "bad-line", "'cat' is no finite number"),
    bad_line("commas", f"0,{BOX.replace(' ', ',')}", "bad-line", "'0,0.1,0.1,"),
    bad_line("decimal commas", "0 0,1 0,1 0,5 0,1 0,5 0,4", "bad-line", "'0,1' is no finite"),
    bad_line("half a class", f"1.5 {BOX}", "bad-line", "class 1.5"),
    bad_line("a negative class", f"-1 {BOX}", "bad-line", "class -1"),
    bad_line("a huge class", f"99999999 {BOX}", "bad-line", "class 99999999"),
    bad_line("NaN", "0 nan 0.1 0.5 0.1 0.5 0.4", "bad-line", "'nan' is no finite number"),
    bad_line("infinity", "0 0.1 0.1 inf 0.1 0.5 0.4", "bad-line", "'inf' is no finite number"),
    bad_line("pixels", "0 6 4 30 4 30 16", "pixel-coordinates", "coordinate 6, expected shares"),
    bad_line("negative", "0 -0.3 0.1 0.5 0.1 0.5 0.4", "outside-mask", "coordinate -0.3"),
    bad_line("too far right", "0 0.1 0.1 1.5 0.1 0.5 0.4", "outside-mask", "coordinate 1.5"),
    bad_line("unknown class", f"2 {BOX}", "unknown-category", "class 2, but the names are those"),
    bad_line("no area", "0 0.1 0.1 0.5 0.1 0.3 0.1", "empty-mask", "", "skipped"),
    bad_line("outside", "0 1.05 0.1 1.09 0.1 1.09 0.3", "outside-mask", "", "skipped"),
    bad_line("thin", "0 0 0.0005 0.9 0.0005 0.95 0.007 0 0.005", "sliver", "too thin", "taken"),
    bad_line("a bow", "0 0.1 0.1 0.9 0.9 0.9 0.1 0.1 0.9", "self-crossing", "segmentation[0]: side",
             "taken"),
    bad_line("out of the frame", "0 0.5 0.1 1.08 0.1 1.08 0.4 0.5 0.4", "clipped-mask",
             "polygons leave the picture by 4.8 pixels", "taken"),
    bad_line("twice", line(0, corners(2, 2)), "duplicate-object",
        "the same class and mask as line 1",
             "taken"),
    Case("no text", raw(TXT, b"0 \xff\xfe"), [("bad-label-file", TXT, None, "no text in UTF-8"),
        *FEW],
         "refused"),
    Case("no labels", in_train,
         [("no-labels", "set.yaml", None, "no picture has a label file, the first would be"),
          ("no-objects", "set.yaml", None, "none of 0 annotations")], "refused"),
    Case("one label file missing", gone(TXT),
         [("rare-class", "set.yaml", 0, "(cat): only 8 objects"),
          ("rare-class", "set.yaml", 1, "(dog): only 8"),
          ("unlabelled-pictures", "set.yaml", None, "1 of 3 pictures have no label file, first: a"),
          ("pictures-without-objects", "set.yaml", None, "1 of 3")], "taken"),
    Case("an empty label file", at(TXT, "\n\n"),
         [("rare-class", "set.yaml", 0, ""), ("rare-class", "set.yaml", 1, ""),
          ("pictures-without-objects", "set.yaml", None, "1 of 3 pictures")], "taken"),
    Case("labels without a picture", at("labels/train/x.txt", line(0, corners(2, 2))),
         [("unused-labels", "labels/train/x.txt", None, "no picture has its name")], "taken"),
    Case("classes from 1", shift(1),
         [("unknown-category", f"labels/train/{name}.txt", row, f"line {row}: class 2")
          for name in NAMES for row in range(5, 9)]
         + [("shifted-ids", "set.yaml", None, "classes 1 to 2 are used, names begin with 0"),
            ("empty-class", "set.yaml", 0, "(cat): no object")], "refused"),
    Case("classes.txt disagrees", at("labels/train/classes.txt", "cat\ncow\n"),
         [("names-disagree", "labels/train/classes.txt", 1, "class 1 is 'cow', but 'dog' in")],
         "taken"),
    Case("classes.txt is shorter", at("classes.txt", "cat\n"),
         [("names-disagree", "classes.txt", 1, "class 1 is none, but 'dog' in")], "taken"),
    Case("classes.txt says the same", at("classes.txt", "cat\ndog\n"), [], "taken"),
    Case("a broken classes.txt beside a yaml", at("classes.txt", "cat\ncat\n"), [], "taken"),
    Case("a name twice", yaml("names: [cat, ' Cat']\ntrain: images/train"),
         [("duplicate-name", "set.yaml", 1, "category 1: named")], "taken"),
    Case("a class too many", yaml("names: [cat, dog, cow]\ntrain: images/train"),
         [("empty-class", "set.yaml", 2, "(cow): no object")], "taken"),
    Case("no yaml", yaml("names: [cat"), [("bad-set", "set.yaml", None, "no valid YAML")],
         "refused"),
    Case("no names", yaml("train: images/train"), [("bad-names", "set.yaml", None,
        "names: expect")],
         "refused"),
    Case("a name missing", yaml("names: [cat, null]\ntrain: images/train"),
         [("bad-names", "set.yaml", None, "class 1 has no name")], "refused"),
    Case("a negative index", yaml("names: {-1: cat}\ntrain: images/train"),
         [("bad-names", "set.yaml", None, "names: index -1")], "refused"),
    Case("no such split", yaml("names: [cat, dog]\nval: images/val"),
         [("bad-set", "set.yaml", None, "train: expected a folder")], "refused"),
    Case("no such folder", yaml("names: [cat, dog]\ntrain: pictures"),
         [("bad-set", "set.yaml", None, "no such folder or list")], "refused"),
    Case("a folder of splits", yaml("names: [cat, dog]\ntrain: images"),
         [("bad-set", "set.yaml", None, "holds train and val")], "refused"),
    Case("a list of pictures that are gone", both(
        yaml("names: [cat, dog]\ntrain: list.txt"),
        at("list.txt", "images/train/a.png\nimages/train/b.png\nimages/train/x.png\n"
                       "images/train/c.png\nimages/train/y.png\n")),
         [("missing-picture", "list.txt", 3, "line 3: images/train/x.png: no such picture"),
          ("missing-picture", "list.txt", 5, "line 5: images/train/y.png")], "refused"),
    Case("an empty list", both(yaml("names: [cat, dog]\ntrain: l.txt"), at("l.txt", "\n")),
         [("bad-set", "set.yaml", None, "lists no picture")], "refused"),
    Case("a picture that is none", raw(A, b"no picture"),
         [("unreadable-picture", A, "a.png", "no picture, or of a format"),
          ("rare-class", "set.yaml", 0, ""), ("rare-class", "set.yaml", 1, "")], "refused"),
    Case("lines of a picture that is none are looked at", both(raw(A, b""), add("0 1")),
         [("unreadable-picture", A, "a.png", ""), ("bad-line", TXT, LINE, ""),
          ("rare-class", "set.yaml", 0, ""), ("rare-class", "set.yaml", 1, "")], "refused"),
    Case("half a picture", cut(A), [("unreadable-picture", A, "a.png", "cannot read")], "later"),
    Case("two pictures of one name", lambda p: save_picture(p / "images/train/a.jpg", 5),
         [("same-labels", A, "a.png", "its labels would be those of a.jpg")], "refused"),
    Case("a picture twice", both(copy(A, "images/train/d.png"), copy(TXT, "labels/train/d.txt")),
         [("duplicate-picture", "images/train/d.png", "d.png", "same pixels as picture a.png")],
         "taken"),
    Case("a quarter turn", turn(A, 6, (WIDTH, HEIGHT)),
         [("orientation", A, "a.png", "EXIF orientation 6; the labels say no size")], "taken"),
    Case("half a turn", turn(A, 3), [("orientation", A, "a.png", "EXIF orientation 3")], "taken"),
    Case("upright", turn(A, 1), [], "taken"),
    Case("no names at all", lambda p: (p / "set.yaml").unlink(),
         [("no-names", "images/train", None, "classes are called 0, 1")], "taken", "images/train"),
    Case("names twice in classes.txt", at("labels/train/classes.txt", "cat\ncat\n"),
         [("bad-names", "labels/train/classes.txt", None, "names 'cat' twice")], "refused",
         "images/train"),
    Case("no name in classes.txt", at("images/classes.txt", "\n"),
         [("bad-names", "images/classes.txt", None, "holds no class name")], "refused",
         "images/train"),
    Case("classes.txt against data.yaml", both(at("labels/train/classes.txt", "cat\ndog\n"),
                                              at("images/data.yaml", "names: [dog, cat]")),
         [("names-disagree", "images/data.yaml", 0, "class 0 is 'dog', but 'cat' in")], "taken",
         "images/train"),
    Case("a folder without pictures",
        lambda p: [(p / f"images/train/{n}.png").unlink() for n in NAMES],
         [("bad-set", "images/train", None, "no pictures there")], "refused", "images/train"),
    Case("no such file", lambda p: None, [("unknown-format", "x.yaml", None, "no such file")],
         "refused", "x.yaml"),
    Case("labels and masks", lambda p: (p / "masks").mkdir(),
         [("unknown-format", ".", None, "holds both labels and masks")], "refused", "."),
    Case("a folder that holds nothing", lambda p: (p / "x").mkdir(),
         [("unknown-format", "x", None, "no labels known")], "refused", "x"),
]  # fmt: skip


def mask(file: str, values: list[int], dtype: type = np.uint8) -> Callable[[Path], None]:
    return lambda folder: save_mask(folder / file, draw(values, dtype))


def image(file: str, mode: str, size: tuple[int, int]) -> Callable[[Path], None]:
    return lambda folder: Image.new(mode, size[::-1]).save(folder / file)


MAP = "masks/a.png"
MASKS = [
    Case("colours", image(MAP, "RGB", SIZE), [("colour-mask", MAP, None, "has colours (RGB)"),
        EMPTY],
         "refused"),
    Case("transparency", image(MAP, "RGBA", SIZE), [("colour-mask", MAP, None, "(RGBA)"), EMPTY],
         "refused"),
    Case("another size", image(MAP, "L", (HEIGHT + 1, WIDTH)),
         [("wrong-mask-size", MAP, None,
         "41 x 60 pixels (height x width), but its picture has 40"), EMPTY],
         "refused"),
    Case("a turned mask", image(MAP, "L", (WIDTH, HEIGHT)),
         [("turned-mask", MAP, None, "turned upright?"), EMPTY], "refused"),
    Case("a mask of a turned picture", turn("images/a.png", 8),
         [("turned-mask", MAP, None, "turned upright?"), EMPTY], "refused"),
    Case("a picture upside down", turn("images/a.png", 3),
         [("orientation", "images/a.png", "a.png", "the size fits with and without it")], "taken"),
    Case("no mask at all", raw(MAP, b"mask"), [("unreadable-mask", MAP, None, "no picture"), EMPTY],
         "refused"),
    Case("half a mask", cut(MAP, 60), [("unreadable-mask", MAP, None, "cannot read"), EMPTY],
        "refused"),
    Case("a broken file of one object", raw("masks/c/object_3.png", b""),
         [("unreadable-mask", "masks/c/object_3.png", None, "")], "refused"),
    Case("map and folder", mask("masks/c.png", [1, 2]),
         [("same-labels", "masks/c.png", None, "there is a folder c, too"), EMPTY], "refused"),
    Case("an object without pixels", mask("masks/c/object_9.png", []),
         [("empty-mask", "masks/c/object_9.png", None, "mask: the mask holds no pixel")],
         "skipped"),
    Case("an object twice", copy("masks/c/object_0.png", "masks/c/object_8.png"),
         [("duplicate-object", "masks/c/object_8.png", None, "mask: the same class and mask")],
         "taken"),
    Case("a mask without a picture", mask("masks/x.png", [1, 2]),
         [("unused-labels", "masks/x.png", None, "no picture has its name")], "taken"),
    Case("a folder of masks without a picture", mask("masks/x/object_1.png", [1]),
         [("unused-labels", "masks/x/object_1.png", None, "")], "taken"),
    Case("a picture without masks", gone(MAP),
         [("unlabelled-pictures", ".", None, "1 of 3 pictures have no mask, first: a.png"),
          ("pictures-without-objects", ".", None, "1 of 3")], "taken"),
    Case("no masks", lambda p: shutil.rmtree(p / "masks") or (p / "masks").mkdir(),
         [("no-labels", ".", None, "no picture has masks, the first would be"),
          ("no-objects", ".", None, "none of 0")], "refused"),
    Case("black and white", both(mask(MAP, [255] * 8), mask("masks/b.png", [255] * 8),
                                 lambda p: shutil.rmtree(p / "masks/c"), mask("masks/c.png",
                                     [255])),
         [("one-object-masks", ".", None, "each of 3 id maps has the one value 255: one object a "
                                          "picture, though in 2 its parts lie apart"),
          ("rare-class", ".", 1, "only 3 objects")], "taken"),
    Case("one object a picture", both(mask(MAP, [255]), mask("masks/b.png", [255]),
                                      lambda p: shutil.rmtree(p / "masks/c"),
                                      mask("masks/c.png", [0, 255])),
         [("rare-class", ".", 1, "only 3 objects")], "taken"),
    Case("a class that classes.txt lacks", both(mask("masks/c/dog_1.png", [0, 0, 1]),
                                                at("classes.txt", "object\n")),
         [("unknown-category", "masks/c/dog_1.png", None, "class 'dog' is not in classes.txt")],
         "refused"),
    Case("classes.txt without objects' class", at("classes.txt", "cell\n"),
         [("unknown-category", f"masks/{n}.png", None, "class 'object'") for n in "ab"]
         + [("unknown-category", f"masks/c/object_{i}.png", None, "") for i in range(8)]
         + [("no-objects", ".", None, "")], "refused"),
    Case("a few of a class", mask("masks/c/dog_1.png", [0, 0, 1]),
         [("rare-class", ".", 1, "(dog): only 1 object")], "taken"),
    Case("classes.txt names none", at("classes.txt", ""),
         [("bad-names", "classes.txt", None, "holds no class name")], "refused"),
    Case("a picture gone", gone("images/a.png"),
         [("unused-labels", MAP, None, "no picture has its name")], "taken"),
    Case("a picture that is none", raw("images/a.png", b"x"),
         [("unreadable-picture", "images/a.png", "a.png", "")], "refused"),
    Case("half a picture", cut("images/a.png"),
         [("unreadable-picture", "images/a.png", "a.png", "cannot read")], "later"),
    Case("two pictures of one name", lambda p: save_picture(p / "images/a.jpg", 9),
         [("same-labels", "images/a.png", "a.png", "those of a.jpg")], "refused"),
    Case("no pictures", lambda p: shutil.rmtree(p / "images") or (p / "images").mkdir(),
         [("bad-set", ".", None, "images: no pictures there")], "refused"),
]  # fmt: skip


def edit(change: Callable[[dict], object], file: str = "a.json") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        write(folder / file, content)

    return apply


TRIANGLE = [[1, 1], [9, 1], [9, 9]]


def bad_shape(name: str, value: object, kind: str, words: str, outcome: str = "refused") -> Case:
    change = edit(lambda content: content["shapes"].append(value))
    return Case(name, change, [(kind, "a.json", 8, f"shapes[8]: {words}")], outcome)


def bad_json(name: str, changes: dict, kind: str, words: str, id: object = None) -> Case:
    """The json costs its picture: too few objects remain."""
    rare = [("rare-class", ".", number, "only 8 objects") for number in (1, 2)]
    note = [("unlabelled-pictures", ".", None, "1 pictures have no json")]
    return Case(name, edit(lambda content: content.update(changes)),
                [(kind, "a.json", id, words), *rare, *note], "refused")  # fmt: skip


LABELME = [
    bad_shape("no object", 7, "wrong-type", "7, expected an object"),
    bad_shape("no label", shape(None, TRIANGLE), "wrong-type", "label: expected a text"),
    bad_shape("a blank label", shape(" ", TRIANGLE), "wrong-type", "label: expected a text"),
    bad_shape("half a group", shape("cat", TRIANGLE, group=1.5), "wrong-type", "group_id: "),
    bad_shape("a line", shape("cat", TRIANGLE, "line"), "bad-shape", "shape_type 'line'"),
    bad_shape("a point", shape("cat", [[3, 3]], "point"), "bad-shape", "shape_type 'point'"),
    bad_shape("a mask", shape("cat", TRIANGLE, "mask"), "bad-shape", "shape_type 'mask'"),
    bad_shape("a number as type", shape("cat", TRIANGLE, 3), "bad-shape", "shape_type 3"),
    bad_shape("two points", shape("cat", TRIANGLE[:2]), "few-points", "a polygon of 2 points"),
    bad_shape("no points", shape("cat", []), "few-points", "a polygon of 0 points"),
    bad_shape("points null", shape("cat", None), "wrong-type", "points: expected a list"),
    bad_shape("flat points", shape("cat", [1, 2, 3]), "wrong-type", "points: expected a list"),
    bad_shape("three of x, y", shape("cat", [[1, 2, 3]] * 3), "wrong-type", "points: expected"),
    bad_shape("a text in points", shape("cat", [*TRIANGLE, ["1", 2]]), "bad-polygon", "points: a"),
    bad_shape("NaN", shape("cat", [*TRIANGLE, [float("nan"), 2]]), "bad-polygon", "points: a coo"),
    bad_shape("infinity", shape("cat", [*TRIANGLE, [-float("inf"), 2]]), "bad-polygon", "points:"),
    bad_shape("a huge point", shape("cat", [*TRIANGLE, [10**400, 2]]), "bad-polygon", "points: a"),
    bad_shape("rectangle of 3", shape("cat", TRIANGLE, "rectangle"), "bad-shape",
        "a rectangle of 3"),
    bad_shape("circle of 3", shape("cat", TRIANGLE, "circle"), "bad-shape", "a circle of 3"),
    bad_shape("circle of radius 0", shape("cat", [[3, 3], [3, 3]], "circle"), "bad-shape",
              "a circle of radius 0"),
    bad_shape("a flat rectangle", shape("cat", [[3, 3], [9, 3]], "rectangle"), "empty-mask", "",
              "skipped"),
    bad_shape("outside", shape("cat", [[90, 5], [99, 5], [99, 9]]), "outside-mask", "", "skipped"),
    bad_shape("far outside", shape("cat", [[90, 5], [9999, 5], [99, 9]]), "outside-mask", "",
              "skipped"),
    bad_shape("out of the frame", shape("cat", [[50, 5], [69, 5], [69, 9], [50, 9]]),
              "clipped-mask", "polygons leave the picture by 9.0 pixels", "taken"),
    bad_shape("a bow", shape("cat", [[5, 5], [30, 30], [30, 5], [5, 30]]), "self-crossing",
              "segmentation[0]: side 0 crosses side 2", "taken"),
    bad_shape("twice", shape("cat", corners(*PLACES[0])), "duplicate-object",
              "the same class and mask as shapes[0]",
              "taken"),
    Case("a flat part", edit(lambda content: content["shapes"].extend(
             [shape("cat", corners(30, 30), group=5), shape("cat", [[1, 1], [9, 1], [5, 1]],
             group=5)])),
         [("empty-part", "a.json", 8, "shapes[8]: 1 of 2 polygons cover nothing")], "taken"),
    Case("a crooked spelling", edit(lambda content: content["shapes"][0].update(label="Cat")),
         [("duplicate-name", ".", 2, "named cat, as is category 1"),
          ("rare-class", ".", 1, "(Cat): only 1 object")], "taken"),
    Case("a label that classes.txt lacks", both(
             at("classes.txt", "cat\ndog\n"),
             edit(lambda content: content["shapes"].append(shape("cow", TRIANGLE)))),
         [("unknown-category", "a.json", 8, "shapes[8]: class cow is not in classes.txt")],
         "refused"),
    Case("a class that nobody drew", at("classes.txt", "cat\ndog\ncow\n"),
         [("empty-class", ".", 2, "(cow): no object")], "taken"),
    Case("two faults in a shape", edit(lambda content: content["shapes"].append({"points": 3})),
         [("wrong-type", "a.json", 8, "shapes[8]: points"),
          ("wrong-type", "a.json", 8, "shapes[8]: label")], "refused"),
    Case("no shapes", edit(lambda content: content.pop("shapes"), "b.json"),
         [("missing-key", "b.json", None, "shapes: expected a list: this is no LabelMe json"),
          ("rare-class", ".", 1, ""), ("rare-class", ".", 2, ""),
          ("pictures-without-objects", ".", None, "1 of 3")], "refused"),
    bad_json("no path", {"imagePath": None}, "wrong-type", "imagePath: expected"),
    bad_json("a path with a zero", {"imagePath": "a\0"}, "wrong-type", "imagePath: expected"),
    bad_json("height a text", {"imageHeight": "40"}, "wrong-type", "expected whole numbers from 1"),
    bad_json("no height", {"imageHeight": None}, "wrong-type", "imageHeight and imageWidth"),
    bad_json("height 0", {"imageHeight": 0}, "wrong-type", "imageHeight and imageWidth"),
    bad_json("height huge", {"imageHeight": 10**400}, "bad-size", "is too large"),
    Case("no json", at("a.json", "{"),
         [("bad-json", "a.json", None, "line 1: no valid json"), ("rare-class", ".", 1, ""),
          ("rare-class", ".", 2, ""), ("unlabelled-pictures", ".", None, "")], "refused"),
    Case("a coco json among them", at("z.json", {"images": [], "annotations": []}),
         [("missing-key", "z.json", None, "shapes: expected a list"),
          ("missing-key", "z.json", None, "imagePath: expected")], "refused"),
    Case("a picture with two jsons", copy("a.json", "d.json"),
         [("same-labels", "d.json", None, "a.png has labels in another json")], "refused"),
    Case("a picture without a json", lambda p: save_picture(p / "x.png", 9),
         [("unlabelled-pictures", ".", None,
         "1 pictures have no json, and are not used, first: x")],
         "taken"),
    Case("a picture gone", gone("a.png"),
         [("missing-picture", "a.png", "a.png", "no such picture")], "later"),
    Case("a picture gone, its size not said", both(gone("a.png"), edit(
             lambda content: content.update(imageHeight=None, imageWidth=None))),
         [("missing-picture", "a.png", "a.png", "no such picture"), ("rare-class", ".", 1, ""),
          ("rare-class", ".", 2, "")], "refused"),
    Case("another size", edit(lambda content: content.update(imageHeight=41)),
         [("wrong-size", "a.png", "a.png", "40 x 60 pixels (height x width), the json says 41 x")],
         "later"),
    Case("height and width exchanged", both(
             edit(lambda content: content.update(imageHeight=WIDTH, imageWidth=HEIGHT)),
             edit(lambda content: content.update(shapes=[s for s in content["shapes"]
                                                         if s["points"][1][0] < HEIGHT]))),
         [("swapped-size", "a.png", "a.png", "the json says 60 x 40: exchanged")], "later"),
    Case("drawn before EXIF", turn("a.png", 6),
         [("turned-picture", "a.png", "a.png", "fits the pixels as stored, before EXIF orient")],
         "later"),
    Case("drawn after EXIF", turn("a.png", 6, (WIDTH, HEIGHT)), [], "taken"),
    Case("upside down", turn("a.png", 3), [("orientation", "a.png", "a.png", "")], "taken"),
    Case("upside down, its size not said", both(turn("a.png", 5, (WIDTH, HEIGHT)), edit(
             lambda content: content.update(imageHeight=None, imageWidth=None))),
         [("orientation", "a.png", "a.png", "the labels say no size")], "taken"),
    Case("half a picture", cut("a.png"), [("unreadable-picture", "a.png", "a.png", "cannot")],
         "later"),
    Case("no shape at all", both(*(edit(lambda content: content.update(shapes=[]), f"{name}.json")
                                   for name in NAMES)),
         [("no-objects", ".", None, "none of 0 annotations")], "taken"),
]  # fmt: skip


def lvis(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return edit(change, "train.json")


LVIS = [
    Case("no frequency", lvis(lambda v: v["categories"][0].pop("frequency")),
         [("missing-key", "train.json", 1, "category 1: frequency is missing")], "refused"),
    Case("a frequency that is none", lvis(lambda v: v["categories"][0].update(frequency="x")),
         [("bad-frequency", "train.json", 1, "frequency is x")], "refused"),
    Case("no list of absent classes", lvis(lambda v: v["images"][0].pop("neg_category_ids")),
         [("missing-key", "train.json", 0, "picture 0: neg_category_ids is missing")], "refused"),
    Case("an absent class that is none",
        lvis(lambda v: v["images"][0].update(neg_category_ids=[9])),
         [("unknown-category", "train.json", 0, "no category has the id 9")], "refused"),
    Case("a mask that is skipped", lvis(lambda v: v["annotations"][0].update(
             segmentation=[[1, 1, 1, 1, 1, 1]], bbox=None, area=None)),
         [("empty-mask", "train.json", 0, "annotation 0: the mask holds no pixel")], "skipped"),
    Case("a box of corners", lvis(lambda v: v["annotations"][3].update(bbox=[44, 2, 53, 11])),
         [("corner-box", "train.json", 3, "annotation 3: bbox [44, 2, 53, 11]")], "taken"),
    Case("a picture gone", gone("images/a.png"),
         [("missing-picture", "images/train/a.png", 0, "no such picture")], "later"),
    Case("classes from 0", lvis(lambda v: [e.update(category_id=e["category_id"] - 1)
                                           for e in v["annotations"]]),
         [("unknown-category", "train.json", 8 * n + i, "unknown category_id 0")
          for n in range(3) for i in range(4)]
         + [("shifted-ids", "train.json", None, "classes 0 to 1, the table 1 to 2: ids shifted"),
            ("empty-class", "train.json", 2, "")], "skipped"),
]  # fmt: skip

IDS = "gtFine/train/bonn/bonn_000000_000019_gtFine_instanceIds.png"
POLYGONS = "gtFine/train/bonn/bonn_000011_000019_gtFine_polygons.json"
CITY = "leftImg8bit/train/bonn/bonn_000000_000019_leftImg8bit.png"
CITYSCAPES = [
    Case("an id that is none", mask(IDS, [99, *range(24000, 33000, 1000)], np.uint16),
         [("unknown-category", IDS, 99, "value 99: expected a class id")], "refused"),
    Case("half a map", cut(IDS), [("unreadable-mask", IDS, None, "cannot read")], "refused"),
    Case("a label that is none", edit(lambda v: v["objects"].append(
             {"label": "dragon", "polygon": TRIANGLE}), POLYGONS),
         [("unknown-category", POLYGONS, 8, "objects[8]: label dragon")], "refused"),
    Case("two points", edit(lambda v: v["objects"].append(
             {"label": "car", "polygon": TRIANGLE[:2]}), POLYGONS),
         [("few-points", POLYGONS, 8, "objects[8]: a polygon of 2 points")], "refused"),
    Case("labels without a picture", gone(CITY),
         [("unused-labels", IDS, None, "no picture has its name")], "taken"),
    Case("no labels", gone(IDS), [("no-labels", CITY, "bonn/" + Path(CITY).name, "has no labels")],
         "refused"),
    Case("no pictures", lambda p: shutil.rmtree(p / "leftImg8bit"),
         [("bad-set", ".", None, "no folder leftImg8bit")], "refused"),
]  # fmt: skip

VOC = [
    Case("a class that is none", mask("SegmentationClass/p0.png", [77, *range(2, 9)]),
         [("unknown-category", "SegmentationObject/p0.png", 1,
         "value 1: most of its pixels are 77"),
          ("rare-class", ".", 1, "only 9 objects")], "refused"),
    Case("a list that is gone", lambda p: shutil.rmtree(p / "ImageSets"),
         [("bad-set", ".", None, "train.txt: no such list of pictures")], "refused"),
    Case("a picture that is gone", both(
             at("ImageSets/Segmentation/train.txt", "".join(f"p{i}\n" for i in range(26)))),
         [("missing-picture", "ImageSets/Segmentation/train.txt", 26, "line 26: p25")], "refused"),
    Case("a mask in colours", image("SegmentationClass/p24.png", "RGB", SIZE),
         [("colour-mask", "SegmentationClass/p24.png", None, "")]
         + [("rare-class", ".", 13 + i, "only 9") for i in range(8)], "refused"),
]  # fmt: skip

BATTERY = [
    (name, case)
    for name, cases in {
        "yolo": YOLO, "masks": MASKS, "labelme": LABELME,
        "lvis": LVIS, "cityscapes": CITYSCAPES, "voc": VOC,
    }.items()
    for case in cases
]  # fmt: skip


@pytest.mark.parametrize(("name", "case"), BATTERY, ids=[f"{n}-{c}" for n, c in BATTERY])
def test_a_broken_set(originals: dict, name: str, case: Case, tmp_path: Path) -> None:
    folder, path = place_set(originals, name, tmp_path)
    case.change(folder)
    path = path if case.path is None else folder / case.path
    before = {file: file.stat().st_mtime for file in folder.rglob("*")}
    faults = find(path)
    assert before == {file: file.stat().st_mtime for file in folder.rglob("*")}
    said = [(fault.kind, Path(fault.file), fault.id) for fault in faults]
    assert said == [(kind, folder / file, id) for kind, file, id, _ in case.faults], faults
    for fault, (*_, words) in zip(faults, case.faults, strict=True):
        assert words in fault.message
    assert read_all(path, faults) == case.outcome


def test_the_battery_is_large_and_every_kind_is_in_one() -> None:
    assert len({(name, case.name) for name, case in BATTERY}) == len(BATTERY) >= 150
    tested = {kind for _, case in BATTERY for kind, *_ in case.faults}
    tested |= {kind for _, kinds in test_check.ANNOTATIONS for kind in kinds}
    for cases in (test_check.SETS, test_check.PICTURES):
        tested |= {kind for case in cases for kind, _ in case[2]}
    # These have tests of their own.
    assert set(KINDS) - tested == {"missing-folder", "class-mismatch"}
    text = (Path(__file__).parents[1] / "docs/data.md").read_text().partition("## Checking")[2]
    assert set(re.findall("`([a-z-]+)`", text)) >= set(KINDS)
    # Whoever reports a fault must have said in KINDS what to do about it.
    text = "".join(file.read_text() for file in Path(faults.__file__).parent.glob("*.py"))
    used = re.findall(
        r'(?:report|tell|return|reporting\(report,) ?\(?\s*"([a-z]+(?:-[a-z]+)+)"', text
    )
    assert len(set(used)) > 30
    assert set(used) <= set(KINDS)


# ---------------------------------------------------------------------- one split and the other


def test_both_splits_of_a_yaml(originals: dict, tmp_path: Path) -> None:
    folder, path = place_set(originals, "yolo", tmp_path)
    assert find(path, against=path) == []
    copy("images/train/a.png", "images/val/b.png")(folder)
    write(folder / "labels/val/c.txt", "0 0.5")
    leak, row = sorted(find(path, against=path), key=lambda fault: fault.kind, reverse=True)
    assert (leak.kind, leak.id) == ("leaked-picture", "a.png")
    assert f"picture b.png (b.png) of {path} (val)" in leak.message
    assert (row.kind, row.file) == ("bad-line", str(folder / "labels/val/c.txt"))
    assert find(path) == []
    assert [fault.kind for fault in find(path, split="val")][:1] == ["bad-line"]


def test_faults_that_both_splits_share_are_said_once(originals: dict, tmp_path: Path) -> None:
    folder, path = place_set(originals, "yolo", tmp_path)
    write(folder / "classes.txt", "dog\ncat\n")
    assert [fault.kind for fault in find(path, against=path)] == ["names-disagree"]


def test_classes_shifted_by_one_between_splits(originals: dict, tmp_path: Path) -> None:
    folder, path = place_set(originals, "labelme", tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    for number, name in enumerate(NAMES):
        save_picture(other / f"{name}.png", 20 + number)
    assert find(path, against=other) == []
    edit(lambda content: content["shapes"].append(shape("ant", TRIANGLE)))(other)
    edit(lambda content: content["shapes"].extend(shape("zoo", TRIANGLE) for _ in range(3)))(path)
    shifted, only, new = (f for f in find(path, against=other) if f.kind == "class-mismatch")
    assert (shifted.file, shifted.id) == (str(other), None)
    assert "cat is category 2, but 1 in set: ids shifted by one, of 2 classes" in shifted.message
    assert "category 1: ant is not in set" in only.message
    assert "category 3: zoo is in set only" in new.message
    with pytest.raises(AssertionError):
        assert read(path, quiet=True).categories == read(other, quiet=True).categories


def test_a_folder_of_pictures_that_is_not_there(originals: dict, tmp_path: Path) -> None:
    for name in ("masks", "labelme", "lvis"):
        _, path = place_set(originals, name, tmp_path / name)
        (fault,) = find(path, images=tmp_path / "none")
        assert (fault.kind, fault.file) == ("missing-folder", str(tmp_path / "none"))


def test_command(originals: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = place_set(originals, "yolo", tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main(["data", "check", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out

    assert run(path, "--against", path, "--strict") == (0, "no faults\n")
    write(folder / "labels/val/a.txt", f"0 {BOX}\n")
    assert run(path, "--strict")[0] == 0
    code, out = run(path, "--split", "val", "--strict")
    assert code == 1
    assert "rare-class" in out
    add("0 12 8 30 8 30 20")(folder)
    code, out = run(path, "--json")
    assert code == 2
    (fault,) = json.loads(out)
    assert fault["file"] == str(folder / TXT)
    assert (fault["id"], fault["kind"]) == (LINE, "pixel-coordinates")
