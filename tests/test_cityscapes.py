import json

import numpy as np
import pytest
from cityscapesscripts.evaluation.instances2dict import instances2dict
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import labels as official_labels
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from PIL import Image
from pycocotools import mask as coco_mask

from brefine.data import cityscapes
from brefine.data.loader import read_labelled
from brefine.data.read import read
from brefine.structures import InputError

SIZE = 60, 100  # height, width
CITIES = ("frankfurt", "lindau")
#: every label that polygons may have: known ones, and groups of some
WORDS = [label.name for label in official_labels] + [
    *("persongroup", "ridergroup", "cargroup", "truckgroup", "bicyclegroup", "caravangroup"),
    *("skygroup", "license plategroup"),
]


def draw_objects(random, count=60):
    """Objects as polygons.json has them, in whole and broken pixels, some outside."""
    objects = []
    for _ in range(count):
        corners = int(random.integers(3, 9))
        middle = random.uniform(-5, 1) + random.uniform(0, 1, 2) * SIZE[::-1]
        points = middle + random.normal(0, random.uniform(2, 20), (corners, 2))
        points = points.round(2).tolist() if random.random() < 0.3 else points.astype(int).tolist()
        words = WORDS if random.random() < 0.5 else ["car", "person", "cargroup", "bicycle"]
        entry = {"label": str(random.choice(words)), "polygon": points}
        if random.random() < 0.3:
            entry |= {"deleted": int(random.random() < 0.5), "verified": 1, "user": "x"}
        objects.append(entry)
    return objects


def base_of(root, split, city, number):
    name = f"{city}_{number:06}_000019"
    return (
        root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png",
        root / "gtFine" / split / city / f"{name}_gtFine",
    )


def write(root, splits=("val",), seed=0, objects=draw_objects, pictures=2):
    """A set in the official layout; its id maps are drawn by the official tool."""
    random = np.random.default_rng(seed)
    for split in splits:
        for city in CITIES:
            for number in range(pictures):
                picture, base = base_of(root, split, city, number)
                for file in (picture, base):
                    file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", SIZE[::-1], (len(split), 0, number)).save(picture)
                content = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": objects(random)}
                polygons = f"{base}_polygons.json"
                with open(polygons, "w") as file:
                    json.dump(content, file)
                annotation = Annotation()
                annotation.fromJsonFile(polygons)
                # The tool's own saving needs Pillow < 13, which still wrote 32-bit images as PNG.
                ids = np.array(createInstanceImage(annotation, "ids")).astype(np.uint16)
                Image.fromarray(ids).save(f"{base}_instanceIds.png")
                Image.new("RGBA", SIZE[::-1]).save(f"{base}_color.png")
                Image.new("L", SIZE[::-1]).save(f"{base}_labelIds.png")
    return root


def objects_of(dataset):
    """Per picture: (category id, crowd, mask as bytes) of every annotation, sorted."""
    found = {}
    for index, picture in enumerate(dataset.pictures):
        found[picture.id] = sorted(
            (entry["category_id"], entry["iscrowd"], pixels_of(entry["segmentation"], picture.size))
            for entry in dataset.annotations(index)
        )
    return found


def pixels_of(segmentation, size):
    assert segmentation["size"] == list(size)
    return coco_mask.decode(segmentation).astype(bool).tobytes()


def official_objects(root, split="val"):
    """The same from the id maps, straight from the definition."""
    known = {label.id for label in official_labels if label.hasInstances and not label.ignoreInEval}
    found = {}
    for picture in sorted((root / "leftImg8bit" / split).rglob("*.png")):
        base = root / "gtFine" / split / picture.parent.name / picture.name.split("_left")[0]
        ids = np.array(Image.open(f"{base}_gtFine_instanceIds.png"))
        entries = []
        for value in np.unique(ids).tolist():
            category = value if value < 1000 else value // 1000
            if category in known:
                entries.append((category, int(value < 1000), (ids == value).tobytes()))
        found[f"{picture.parent.name}/{picture.name}"] = sorted(entries)
    return found


def drop_ids(root):
    for file in root.rglob("*_instanceIds.png"):
        file.unlink()


def test_the_classes_are_the_official_ones():
    evaluated = {
        label.id: label.name
        for label in official_labels
        if label.hasInstances and not label.ignoreInEval
    }
    assert evaluated == cityscapes.CATEGORIES
    assert len(evaluated) == 8
    assert {label.name: label.id for label in official_labels} == cityscapes._IDS
    with_objects = [label.id for label in official_labels if label.hasInstances]
    assert with_objects == list(cityscapes.WITH_OBJECTS)


def test_id_maps_are_read_as_the_official_tools_do(tmp_path, capsys):
    root = write(tmp_path / "set")
    dataset = read(root)
    assert capsys.readouterr().err == f"{root}: Cityscapes, 4 pictures, 8 classes\n"
    assert not dataset.skipped
    mine, theirs = objects_of(dataset), official_objects(root)
    assert mine == theirs
    assert sum(crowd for entries in mine.values() for _, crowd, _ in entries) >= 4
    assert sum(map(len, mine.values())) > 60
    names = {category.id: category.name for category in dataset.categories}
    for name, entries in mine.items():
        city, file = name.split("/")
        ids = root / "gtFine/val" / city / file.replace("leftImg8bit", "gtFine_instanceIds")
        official = instances2dict([str(ids)])[str(ids)]
        for number, label in names.items():
            pixels = sorted(
                (int(entry["instID"] < 1000), entry["pixelCount"]) for entry in official[label]
            )
            own = [(crowd, sum(mask)) for n, crowd, mask in entries if n == number]
            assert sorted(own) == pixels
    for index, picture in enumerate(dataset.pictures):
        target = dataset.target(index)
        whole = [entry for entry in mine[picture.id] if not entry[1]]
        assert sorted(dataset.categories[label].id for label in target.labels.tolist()) == sorted(
            number for number, _, _ in whole
        )


@pytest.mark.parametrize("seed", range(12))
def test_polygons_are_drawn_as_the_official_tool_does(tmp_path, seed):
    root = write(tmp_path / "set", seed=seed, pictures=1)
    expected = official_objects(root)
    assert objects_of(read(root, quiet=True)) == expected
    drop_ids(root)
    dataset = read(root, quiet=True)
    assert objects_of(dataset) == expected
    assert not dataset.skipped


def test_id_maps_come_before_polygons(tmp_path):
    root = write(tmp_path / "set", pictures=1)
    expected = official_objects(root)
    for file in root.rglob("*_polygons.json"):
        file.write_text("no json")
    assert objects_of(read(root, quiet=True)) == expected


def test_later_polygons_cover_earlier_ones_of_any_class(tmp_path):
    square = [[0, 0], [99, 0], [99, 59], [0, 59]]
    left = [[0, 0], [49, 0], [49, 59], [0, 59]]

    def objects(_):
        return [
            {"label": "car", "polygon": square},
            {"label": "sky", "polygon": left},
            {"label": "license plate", "polygon": square},
            {"label": "truck", "polygon": square, "deleted": 1},
        ]

    root = write(tmp_path / "set", objects=objects, pictures=1)
    drop_ids(root)
    dataset = read(root, quiet=True)
    target = dataset.target(0)
    assert [dataset.categories[label].name for label in target.labels.tolist()] == ["car"]
    assert target.boxes.tolist() == [[50, 0, 100, 60]]


@pytest.mark.parametrize(
    ("inside", "split", "expected"),
    [
        (".", "train", "train"),
        (".", "val", "val"),
        ("gtFine", "train", "train"),
        ("leftImg8bit", "val", "val"),
        ("gtFine/train", "val", "train"),
        ("leftImg8bit/train", "val", "train"),
        ("gtFine/val", "train", "val"),
    ],
)
@pytest.mark.parametrize("here", [False, True])
def test_the_split_comes_from_the_path_or_the_argument(
    tmp_path, monkeypatch, inside, split, expected, here
):
    root = write(tmp_path / "set", ("train", "val"), pictures=1)
    if here:
        monkeypatch.chdir(root / inside)
    dataset = read("." if here else root / inside, split=split, quiet=True)
    assert [p.file.parts[-3:-1] for p in dataset.pictures] == [(expected, city) for city in CITIES]
    assert int(read_labelled(dataset, 0)[0, 0, 0]) == len(expected)
    assert objects_of(dataset) == official_objects(root, expected)


def test_pictures_may_lie_elsewhere(tmp_path):
    root = write(tmp_path / "set", pictures=1)
    expected = official_objects(root)
    (root / "leftImg8bit/val").rename(tmp_path / "photos")
    (root / "leftImg8bit").rmdir()
    dataset = read(root, tmp_path / "photos", quiet=True)
    assert objects_of(dataset) == expected
    assert dataset.pictures[0].file.is_relative_to(tmp_path / "photos")


def test_labels_without_a_picture_are_counted(tmp_path, capsys):
    root = write(tmp_path / "set")
    base_of(root, "val", "lindau", 1)[0].unlink()
    assert len(read(root)) == 3
    assert "3 pictures, 8 classes, 2 label files without a picture" in capsys.readouterr().err
    doubts = cityscapes.read(root)["info"]["doubts"]
    assert [(kind, file.name) for kind, file, _, _ in doubts] == [
        ("unused-labels", "lindau_000001_000019_gtFine_instanceIds.png"),
        ("unused-labels", "lindau_000001_000019_gtFine_polygons.json"),
    ]


# --- faults


def refuse(path, message, **options):
    with pytest.raises(InputError) as caught:
        read(path, **options)
    assert str(caught.value) == message


def test_what_is_missing_as_a_whole_is_said(tmp_path):
    root = write(tmp_path / "set", pictures=1)
    refuse(root, f"{root}/gtFine/train: no such folder, there are: val", split="train")
    polygons = f"{base_of(root, 'val', 'lindau', 0)[1]}_polygons.json"
    expected = "name the folder that holds leftImg8bit and gtFine"
    refuse(polygons, f"{polygons}: one picture of Cityscapes: {expected}")
    (root / "leftImg8bit/val").rename(root / "leftImg8bit/test")
    refuse(root, f"{root}/leftImg8bit/val: no such folder, there are: test")
    (root / "leftImg8bit").rename(root / "elsewhere")
    refuse(root, f"{root}: no folder leftImg8bit: unpack leftImg8bit_*.zip there")
    (root / "gtFine").rename(root / "leftImg8bit")
    refuse(root, f"{root}: no folder gtFine: unpack gtFine_trainvaltest.zip there")
    suffixes = ".jpg .jpeg .png .tif .tiff .bmp .webp"
    (root / "leftImg8bit").rename(root / "gtFine")
    (tmp_path / "empty").mkdir()
    message = f"{tmp_path}/empty: no pictures there (looking for {suffixes})"
    refuse(root, message, images=tmp_path / "empty")


def save(pixels, **options):
    return lambda file: Image.fromarray(pixels, **options).save(file)


def cut(file):
    file.write_bytes(file.read_bytes()[:90])


def with_value(value):
    ids = np.zeros(SIZE, np.uint16)
    ids[3, 5] = value
    return save(ids)


def edit(change):
    """The polygons instead of the id map, changed."""

    def break_it(file):
        file.unlink()
        polygons = file.with_name(file.name.replace("instanceIds.png", "polygons.json"))
        content = json.loads(polygons.read_text())
        change(content)
        polygons.write_text(json.dumps(content))

    return break_it


def put(**values):
    return edit(lambda content: content["objects"][2].update(deleted=0, label="car", **values))


def corrupt(file):
    file.unlink()
    file.with_name(file.name.replace("instanceIds.png", "polygons.json")).write_text('{"a":\n1')


IDS, POLYGONS = "gtFine_instanceIds.png", "gtFine_polygons.json"
VALUES = "expected a class id to 33, or 24000 to 33999 for an object"
SQUARE = [[0, 0], [9, 0], [9, 9]]
BROKEN = {
    "cut off": (cut, "unreadable-mask", IDS, None, "cannot read the picture: "),
    "no picture": (
        lambda file: file.write_text("x"), "unreadable-mask", IDS, None,
        "no picture, or of a format that Pillow cannot read",
    ),
    "in colours": (
        save(np.zeros((*SIZE, 4), np.uint8)), "colour-mask", IDS, None,
        "has colours (RGBA), expected one channel of 8 or 16 bits",
    ),
    "of another size": (
        save(np.zeros((30, 50), np.uint16)), "wrong-mask-size", IDS, None,
        "30 x 50 pixels (height x width), but its picture has 60 x 100",
    ),
    "turned": (
        save(np.zeros(SIZE[::-1], np.uint16)), "turned-mask", IDS, None,
        "100 x 60 pixels (height x width), but its picture has 60 x 100: was it drawn before the "
        "picture was turned upright?",
    ),
    "training ids": (
        with_value(11003), "unknown-category", IDS, 11003, f"value 11003: {VALUES}"
    ),
    "a class beyond the last": (
        with_value(34), "unknown-category", IDS, 34, f"value 34: {VALUES}"
    ),
    "an object beyond the last class": (
        with_value(34001), "unknown-category", IDS, 34001, f"value 34001: {VALUES}"
    ),
    "broken json": (
        corrupt, "bad-json", POLYGONS, None, "line 2: no valid json: Expecting ',' delimiter"
    ),
    "no height": (
        edit(lambda content: content.pop("imgHeight")), "missing-key", POLYGONS, None,
        "imgHeight is missing",
    ),
    "no objects": (
        edit(lambda content: content.pop("objects")), "missing-key", POLYGONS, None,
        "objects is missing",
    ),
    "size as text": (
        edit(lambda content: content.update(imgWidth="100")), "wrong-size", POLYGONS, None,
        "imgHeight and imgWidth are 60 and 100, but its picture has 60 x 100",
    ),
    "polygons of another size": (
        edit(lambda content: content.update(imgWidth=2048, imgHeight=1024)),
        "wrong-size", POLYGONS, None,
        "imgHeight and imgWidth are 1024 and 2048, but its picture has 60 x 100",
    ),
    "objects as a dict": (
        edit(lambda content: content.update(objects={})), "wrong-type", POLYGONS, None,
        "objects is {}, expected a list",
    ),
    "a number as object": (
        edit(lambda content: content["objects"].insert(2, 7)), "wrong-type", POLYGONS, 2,
        "objects[2] is 7, expected an object",
    ),
    "no label": (
        edit(lambda content: content["objects"].insert(2, {"polygon": SQUARE})),
        "missing-key", POLYGONS, 2, "objects[2]: label is missing",
    ),
    "no polygon": (
        edit(lambda content: content["objects"].insert(2, {"label": "car"})),
        "missing-key", POLYGONS, 2, "objects[2]: polygon is missing",
    ),
    "unknown label": (
        edit(lambda content: content["objects"].insert(2, {"label": "cow", "polygon": SQUARE})),
        "unknown-category", POLYGONS, 2, "objects[2]: label cow is none of Cityscapes'",
    ),
    "unknown group": (
        edit(lambda content: content["objects"].insert(2, {"label": "group", "polygon": SQUARE})),
        "unknown-category", POLYGONS, 2, "objects[2]: label group is none of Cityscapes'",
    ),
    "two points": (
        put(polygon=[[1, 2], [3, 4]]), "few-points", POLYGONS, 2,
        "objects[2]: a polygon of 2 points, expected 3 or more",
    ),
    "a flat polygon": (
        put(polygon=[1, 2, 3, 4, 5, 6]), "bad-polygon", POLYGONS, 2,
        "objects[2]: polygon: 1 is no point [x, y]",
    ),
    "a polygon as text": (
        put(polygon="1 2 3"), "bad-polygon", POLYGONS, 2,
        "objects[2]: polygon is no list of points [x, y]",
    ),
    "not a number": (
        put(polygon=[*SQUARE, [1, float("nan")]]), "bad-polygon", POLYGONS, 2,
        "objects[2]: polygon: coordinate NaN is no number",
    ),
    "a text as coordinate": (
        put(polygon=[*SQUARE, ["1", 2]]), "bad-polygon", POLYGONS, 2,
        "objects[2]: polygon: coordinate 1 is no number",
    ),
    "infinite": (
        put(polygon=[*SQUARE, [1, float("-inf")]]), "bad-polygon", POLYGONS, 2,
        "objects[2]: polygon: coordinate -Infinity lies far outside",
    ),
    "far outside": (
        put(polygon=[*SQUARE, [10**400, 1]]), "bad-polygon", POLYGONS, 2,
        f"objects[2]: polygon: coordinate 1{'0' * 36}... lies far outside",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_one_line_and_the_rest_is_read(tmp_path, name):
    break_it, kind, end, number, message = BROKEN[name]
    root = write(tmp_path / "set")
    expected = official_objects(root)
    picture, base = base_of(root, "val", "frankfurt", 1)
    break_it(base.with_name(f"{base.name}_instanceIds.png"))
    file = base.with_name(base.name.replace("gtFine", end))
    with pytest.raises(InputError) as caught:
        read(root)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{file}: {message}")
    assert line.endswith(message) or name == "cut off"
    found = []
    given = cityscapes.read(root, report=lambda *fault: found.append(fault))
    assert found == [(kind, file, number, line.removeprefix(f"{file}: "))]
    pictures = [entry["id"] for entry in given["images"]]
    broken = f"frankfurt/{picture.name}"
    assert (broken in pictures) == (number is not None)  # one bad polygon costs no picture
    assert [name for name in expected if name != broken] == [n for n in pictures if n != broken]
    for picture in set(pictures) - {broken}:
        entries = [a for a in given["annotations"] if a["image_id"] == picture]
        assert expected[picture] == sorted(
            (a["category_id"], a["iscrowd"], pixels_of(a["segmentation"], SIZE)) for a in entries
        )


def test_a_picture_needs_labels_and_pixels(tmp_path):
    root = write(tmp_path / "set")
    picture, base = base_of(root, "val", "frankfurt", 1)
    for end in ("instanceIds.png", "polygons.json"):
        base.with_name(f"{base.name}_{end}").unlink()
    broken = base_of(root, "val", "lindau", 0)[0]
    broken.write_text("x")
    found = []
    given = cityscapes.read(root, report=lambda *fault: found.append(fault))
    assert len(given["images"]) == 2
    expected = f"has no labels, expected {base}_instanceIds.png, or its polygons.json"
    reason = "no picture, or of a format that Pillow cannot read"
    assert found == [
        ("no-labels", picture, f"frankfurt/{picture.name}", expected),
        ("unreadable-picture", broken, f"lindau/{broken.name}", reason),
    ]
    refuse(root, f"{picture}: {expected}")


def test_places_name_what_an_annotation_was_read_from(tmp_path):
    root = write(tmp_path / "set", pictures=1)
    (
        base_of(root, "val", "lindau", 0)[1].parent / "lindau_000000_000019_gtFine_instanceIds.png"
    ).unlink()
    content = cityscapes.read(root)
    places = content["info"]["places"]
    assert len(places) == len(content["annotations"]) > 20
    for (file, value, words), entry in zip(places, content["annotations"], strict=True):
        assert words == f"value {value}"
        assert entry["id"] == f"{words} of {file.name}"
        assert file.is_file()
        assert entry["category_id"] == (value if entry["iscrowd"] else value // 1000)
