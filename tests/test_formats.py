import csv
import json
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import shapely
import shapely.geometry
from PIL import Image
from pycocotools import mask as coco_mask

from brefine.data.read import read as read_set
from brefine.evaluate import evaluate_records
from brefine.formats.polygons import (
    iou,
    write_geojson,
    write_labelme,
    write_polygons,
    write_yolo,
)
from brefine.formats.rasters import write_idmap, write_masks
from brefine.formats.records import Predicted, write_coco, write_csv, write_cvat
from brefine.structures import Category, InputError
from samples import blob, dense_rle, random_records, random_set

SIZE = (40, 60)


def record(mask, score, category=3, image="a"):
    box = [0.5, 1.25, 10.0, 20.0]
    rle = dense_rle(mask)
    return {
        "image_id": image,
        "category_id": category,
        "score": score,
        "bbox": box,
        "segmentation": rle,
    }


def square(y, x, side, size=SIZE):
    mask = np.zeros(size, dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def found(name, records, size=SIZE):
    return Predicted(name, name, size, records)


def read(folder, name="a"):
    with Image.open(folder / f"{name}.png") as image:
        assert image.mode == "I;16"
        ids = np.array(image)
    with (folder / f"{name}.csv").open(newline="") as file:
        return ids, list(csv.DictReader(file))


def test_coco_results_come_back_the_same(tmp_path):
    dataset = random_set(0)
    records = random_records(dataset, 0)
    path = tmp_path / "deep" / "results.json"
    write_coco(path, records)
    back = json.loads(path.read_text())
    assert back == records
    assert evaluate_records(back, dataset).values == pytest.approx(
        evaluate_records(records, dataset).values, nan_ok=True, abs=0
    )
    write_coco(path, [])
    assert json.loads(path.read_text()) == []
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_nothing_half_written_replaces_good_results(tmp_path):
    path = tmp_path / "results.json"
    good = [record(square(1, 1, 5), 0.5)]
    write_coco(path, good)
    with pytest.raises(InputError, match="record 1: score"):
        write_coco(path, [*good, record(square(1, 1, 5), float("nan"))])
    assert json.loads(path.read_text()) == good
    assert list(tmp_path.iterdir()) == [path]


def test_id_map_has_the_best_score_on_top(tmp_path):
    masks = [square(0, 0, 10), square(5, 5, 10), square(5, 5, 4), np.zeros(SIZE, bool)]
    scores = [0.9, 0.5, 0.5, 0.7]
    names = [Category(3, "star, big"), Category(8, "gear")]
    records = [record(m, s, c) for m, s, c in zip(masks, scores, [3, 8, 5, 3], strict=True)]
    write_idmap(tmp_path, found("a.jpg", records), names)
    ids, rows = read(tmp_path)
    expected = np.zeros(SIZE, int)
    expected[masks[2]] = 3
    expected[masks[1]] = 2  # equal scores: the first record wins
    expected[masks[0]] = 1
    np.testing.assert_array_equal(ids, expected)
    assert [row["name"] for row in rows] == ["star, big", "gear", "", "star, big"]
    assert [int(row["area"]) for row in rows] == [100, 100, 16, 0]
    assert [int(row["visible"]) for row in rows] == [100, 75, 0, 0]
    assert [float(row["score"]) for row in rows] == scores
    assert [int(row["category_id"]) for row in rows] == [3, 8, 5, 3]
    assert [float(rows[1][k]) for k in ("x", "y", "width", "height")] == [0.5, 1.25, 10, 20]


def test_id_map_against_pycocotools(tmp_path):
    dataset = random_set(3)
    records = random_records(dataset, 3)
    for picture in dataset.pictures:
        mine = [r for r in records if r["image_id"] == picture.id]
        write_idmap(tmp_path, found(f"{picture.id}.png", mine, picture.size))
        ids, rows = read(tmp_path, str(picture.id))
        masks = [coco_mask.decode(r["segmentation"]).astype(bool) for r in mine]
        for k, (mask, row) in enumerate(zip(masks, rows, strict=True), 1):
            better = [
                m
                for j, m in enumerate(masks, 1)
                if (mine[j - 1]["score"], -j) > (mine[k - 1]["score"], -k)
            ]
            seen = mask & ~np.logical_or.reduce(better) if better else mask
            np.testing.assert_array_equal(ids == k, seen)
            assert int(row["visible"]) == seen.sum()


def test_more_than_255_objects_and_none(tmp_path):
    records = [record(square(i // 60, i % 60, 1), 0.5) for i in range(300)]
    write_idmap(tmp_path, found("a", records))
    ids, rows = read(tmp_path)
    assert ids.max() == 300
    assert len(rows) == 300
    write_idmap(tmp_path, found("a", []))  # an earlier run's files are replaced
    ids, rows = read(tmp_path)
    assert not ids.any()
    assert ids.shape == SIZE
    assert rows == []


def test_names_stay_inside_the_folder(tmp_path):
    write_idmap(tmp_path, found("day.1/a.b.jpg", []))
    assert (tmp_path / "day.1" / "a.b.png").exists()
    assert (tmp_path / "day.1" / "a.b.csv").exists()
    for name in ("../a.jpg", "/a.jpg", "x/../../a", ""):
        with pytest.raises(InputError, match="stay inside"):
            write_idmap(tmp_path, found(name, []))


def test_wrong_records_are_named(tmp_path):
    wrong = record(np.ones((4, 4)), 0.5)
    with pytest.raises(InputError, match="record 1 does not fit"):
        write_idmap(tmp_path, found("a", [record(square(0, 0, 3), 0.5), wrong]))
    assert not list(tmp_path.iterdir())
    many = [record(square(0, 0, 1), 0.5)] * 65_536
    with pytest.raises(InputError, match="65536 objects"):
        write_idmap(tmp_path, found("a", many))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        write_coco(tmp_path / "file" / "results.json", [])


# --- every format read back by somebody else


NAMES = [Category(3, 'cat & "dog" <3>'), Category(8, "gear"), Category(5, "nut/bolt")]
POINTS = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
#: the fields that LabelMe's reader asks for, and their types
LABELME = {
    "type": "object",
    "required": ["version", "flags", "shapes", "imagePath", "imageData"],
    "properties": {
        "version": {"type": "string"},
        "flags": {"type": "object", "additionalProperties": {"type": "boolean"}},
        "imagePath": {"type": "string", "minLength": 1},
        "imageData": {"type": ["string", "null"]},
        "imageHeight": {"type": "integer", "minimum": 1},
        "imageWidth": {"type": "integer", "minimum": 1},
        "shapes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["label", "points", "shape_type"],
                "properties": {
                    "label": {"type": "string", "minLength": 1},
                    "points": {"type": "array", "minItems": 3, "items": POINTS},
                    "shape_type": {"const": "polygon"},
                    "flags": {"type": "object", "additionalProperties": {"type": "boolean"}},
                    "group_id": {"type": ["integer", "null"]},
                    "description": {"type": ["string", "null"]},
                    "mask": {"type": ["string", "null"]},
                },
            },
        },
    },
}


def hard_masks(seed, size):
    """Curved ones, noise with holes and pixels that touch at corners, all, one, none."""
    random = np.random.default_rng(seed)
    masks = [blob(random, size) for _ in range(5)]
    masks += [random.random(size) < share for share in (0.1, 0.5, 0.8)]
    ring = blob(random, size)
    masks += [ring & ~blob(random, size), np.ones(size, bool), square(0, size[1] - 1, 1, size)]
    return [*masks, np.zeros(size, bool)]


@pytest.fixture(scope="module", params=[(40, 60), (61, 37)])
def picture(request):
    masks = hard_masks(len(NAMES), request.param)
    random = np.random.default_rng(1)
    records = [
        record(mask, float(random.random()), NAMES[i % 3].id, 70) for i, mask in enumerate(masks)
    ]
    return Predicted("deep/a b.jpg", "deep/a b.jpg", request.param, records), masks


def is_same(mask, other):
    np.testing.assert_array_equal(mask.astype(bool), other.astype(bool))


def drawn(polygon_lists, size):
    """Polygons, each a flat list, as pycocotools draws them together."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygon_lists, *size)))


def test_masks(tmp_path, picture):
    found, masks = picture
    names = ["a", "b"] * 6
    write_masks(tmp_path / "m", found.masks, names)
    for i, (mask, name) in enumerate(zip(masks, names, strict=True), 1):
        file = tmp_path / "m" / f"{name}_{i:04}.png"
        assert file.exists() == mask.any()
        if mask.any():
            is_same(np.array(Image.open(file)), mask)


def test_table(tmp_path, picture):
    found, masks = picture
    write_csv(tmp_path / "t.csv", [found, found], NAMES)
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    for row, mask, said in zip(rows, masks * 2, [*found.records] * 2, strict=True):
        rle = {"size": [int(row["picture_height"]), int(row["picture_width"])]}
        is_same(coco_mask.decode(rle | {"counts": row["counts"]}), mask)
        assert int(row["area"]) == mask.sum()
        assert (float(row["score"]), int(row["image_id"])) == (said["score"], 70)
        assert row["picture"] == found.name
        assert row["name"] == {c.id: c.name for c in NAMES}[int(row["category_id"])]


def test_cvat(tmp_path, picture):
    found, masks = picture
    write_cvat(tmp_path / "a.xml", [found, found], NAMES)
    root = ElementTree.parse(tmp_path / "a.xml").getroot()
    assert root.findtext("version") == "1.1"
    assert [e.text for e in root.findall("meta/task/labels/label/name")] == [c.name for c in NAMES]
    images = root.findall("image")
    assert [image.get("id") for image in images] == ["0", "1"]
    expected = {r["score"]: (r, m) for r, m in zip(found.records, masks, strict=True) if m.any()}
    for image in images:
        assert image.get("name") == found.name
        size = int(image.get("height")), int(image.get("width"))
        assert size == found.size
        elements = image.findall("mask")
        assert len(elements) == len(expected) == 11
        scores = []
        for element in elements:
            # Lengths along the rows of the window, in turn of 0 and of 1.
            lengths = [int(word) for word in element.get("rle").split(",")]
            values = np.repeat(np.arange(len(lengths)) % 2, lengths)
            left, top, width, height = (
                int(element.get(key)) for key in ("left", "top", "width", "height")
            )
            dense = np.zeros(size, bool)
            dense[top : top + height, left : left + width] = values.reshape(height, width)
            scores.append(float(element.findtext("attribute[@name='score']")))
            said, mask = expected[scores[-1]]
            is_same(dense, mask)
            assert element.get("label") == {c.id: c.name for c in NAMES}[said["category_id"]]
        assert scores == sorted(scores)
        assert [int(e.get("z_order")) for e in elements] == sorted(
            int(e.get("z_order")) for e in elements
        )


def test_cvat_has_no_character_that_xml_has_not(tmp_path):
    odd = Predicted("a\x01b\n.png", "", SIZE, [record(square(0, 0, 3), 0.5)])
    write_cvat(tmp_path / "a.xml", [odd], [Category(3, "x\x00y")])
    root = ElementTree.parse(tmp_path / "a.xml").getroot()
    assert root.find("image").get("name") == "a_b_.png"
    assert root.find("image/mask").get("label") == "x_y"


def centres(size):
    ys, xs = np.mgrid[: size[0], : size[1]]
    return xs.ravel() + 0.5, ys.ravel() + 0.5


def test_geojson(tmp_path, picture):
    found, masks = picture
    write_geojson(tmp_path / "a.geojson", found, NAMES, 0.0)
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    some = [(r, m) for r, m in zip(found.records, masks, strict=True) if m.any()]
    for feature, (said, mask) in zip(content["features"], some, strict=True):
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid, shapely.is_valid_reason(shape)
        inside = shapely.contains_xy(shape, *centres(found.size)).reshape(found.size)
        is_same(inside, mask)
        assert shape.area == mask.sum()
        for part in getattr(shape, "geoms", [shape]):
            assert part.exterior.is_ccw  # RFC 7946, if y is taken to go up
            assert not any(hole.is_ccw for hole in part.interiors)
        assert feature["properties"] == {
            "class": {c.id: c.name for c in NAMES}[said["category_id"]],
            "category_id": said["category_id"],
            "image_id": 70,
            "score": said["score"],
        }


def test_polygons(tmp_path, picture):
    found, masks = picture
    write_polygons(tmp_path / "a.json", found, NAMES, 0.0)
    content = json.loads((tmp_path / "a.json").read_text())
    assert (content["picture"], content["height"], content["width"]) == (found.name, *found.size)
    some = [(r, m) for r, m in zip(found.records, masks, strict=True) if m.any()]
    assert any(len(part) > 1 for each in content["objects"] for part in each["polygons"])
    for each, (said, mask) in zip(content["objects"], some, strict=True):
        shape = shapely.MultiPolygon([(part[0], part[1:]) for part in each["polygons"]])
        is_same(shapely.contains_xy(shape, *centres(found.size)).reshape(found.size), mask)
        assert each["bbox"] == said["bbox"]
        assert each["score"] == said["score"]


def test_labelme(tmp_path, picture):
    found, masks = picture
    names = [category.name for category in NAMES]
    objects = [(i % 3, mask) for i, mask in enumerate(found.masks)]
    scores = [said["score"] for said in found.records]
    write_labelme(tmp_path / "a.json", "a.png", found.size, objects, names, 0.0, scores)
    content = json.loads((tmp_path / "a.json").read_text())
    jsonschema.validate(content, LABELME)
    assert {shape["score"] for shape in content["shapes"]} == set(scores[:-1])
    Image.new("RGB", found.size[::-1]).save(tmp_path / "a.png")
    dataset = read_set(tmp_path)
    assert [category.name for category in dataset.categories] == sorted(names)
    read_back = dataset.annotations(0)
    some = [(label, mask) for (label, _), mask in zip(objects, masks, strict=True) if mask.any()]
    for entry, (label, mask) in zip(read_back, some, strict=True):
        is_same(drawn(entry["segmentation"], found.size), mask)
        assert dataset.categories[entry["category_id"] - 1].name == names[label]


def test_yolo(tmp_path, picture):
    found, masks = picture
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", found.size[::-1]).save(tmp_path / "images" / "a.png")
    objects = [(i % 3, mask) for i, mask in enumerate(found.masks)]
    write_yolo(tmp_path / "labels" / "a.txt", found.size, objects, 0.0)
    read_back = read_set(tmp_path).annotations(0)
    some = [(label, mask) for (label, _), mask in zip(objects, masks, strict=True) if mask.any()]
    for entry, (label, mask) in zip(read_back, some, strict=True):
        is_same(drawn(entry["segmentation"], found.size), mask)
        assert entry["category_id"] == label


def outlines_of(name, text, size):
    """What a file says: for each object its parts, each a list of rings ``[n, 2]``."""
    if name == "yolo":
        lines = [np.array(line.split()[1:], float) for line in text.splitlines()]
        return [[[line.reshape(-1, 2) * size[::-1]]] for line in lines]
    content = json.loads(text)
    if name == "polygons":
        return [each["polygons"] for each in content["objects"]]
    if name == "geojson":
        geometries = [feature["geometry"] for feature in content["features"]]
        many = [geometry["type"] == "MultiPolygon" for geometry in geometries]
        shapes = [geometry["coordinates"] for geometry in geometries]
        return [shape if several else [shape] for shape, several in zip(shapes, many, strict=True)]
    objects = {}
    for number, shape in enumerate(content["shapes"]):
        key = shape["group_id"] or -number - 1
        objects.setdefault(key, []).append([shape["points"]])
    return list(objects.values())


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", ["yolo", "labelme", "polygons", "geojson"])
def test_what_outlines_lose_is_what_a_reader_finds(tmp_path, picture, tolerance, name):
    found, masks = picture
    objects = [(i % 3, mask) for i, mask in enumerate(found.masks)]
    write = {
        "yolo": lambda file, t: write_yolo(file, found.size, objects, t),
        "labelme": lambda file, t: write_labelme(file, "a", found.size, objects, "abc", t),
        "polygons": lambda file, t: write_polygons(file, found, NAMES, t),
        "geojson": lambda file, t: write_geojson(file, found, NAMES, t),
    }[name]
    said = write(tmp_path / "x", tolerance)
    assert said.pop() is None  # the one without a pixel
    read_back = outlines_of(name, (tmp_path / "x").read_text(), found.size)
    lost = []
    for parts, after, mask, runs in zip(read_back, said, masks, found.masks, strict=False):
        # Parts one by one, their rings by the even-odd rule.
        total = np.zeros(found.size, bool)
        for part in parts:
            rings = [drawn([np.ravel(ring).tolist()], found.size) for ring in part]
            total |= np.bitwise_xor.reduce(rings).astype(bool)
        measured = (total & mask).sum() / (total | mask).sum()
        assert (0.0 if after is None else iou(runs, after)) == pytest.approx(measured, abs=1e-12)
        lost.append(1 - measured)
    assert len(lost) == len(read_back) == 11
    if tolerance:
        assert max(lost) > 0
        write(tmp_path / "exact", 0.0)
        assert (tmp_path / "exact").stat().st_size > (tmp_path / "x").stat().st_size
    else:
        assert max(lost) == 0
