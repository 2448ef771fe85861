import copy
import importlib.util
import json
import pickle
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from brefine.data import lvis
from brefine.data.coco import CocoSet, read_json
from brefine.data.loader import read_labelled
from brefine.data.read import read
from brefine.rle import decode
from brefine.structures import InputError

CLASSES = 1203


def load_official():
    """The class LVIS of the official package, without what the package imports to draw."""
    folder = Path(importlib.util.find_spec("lvis").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("official_lvis", folder / "lvis.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LVIS


def polygon(random, height, width):
    """A star-shaped outline inside the picture."""
    angles = np.sort(random.uniform(0, 2 * np.pi, random.integers(5, 12)))
    radii = random.uniform(3, 10, len(angles))
    x = random.uniform(0, width) + radii * np.cos(angles)
    y = random.uniform(0, height) + radii * np.sin(angles)
    points = np.stack([x.clip(0, width), y.clip(0, height)], 1)
    return points.reshape(-1).round(2).tolist()


def make_content(seed=0, pictures=7):
    """A json as LVIS v1 has it, its classes and annotations in no order."""
    random = np.random.default_rng(seed)
    categories = [
        {
            "id": number,
            "name": f"thing_{number}",
            "synonyms": [f"thing_{number}"],
            "synset": f"thing.n.{number}",
            "def": "a thing",
            "frequency": "rcf"[random.integers(3)],
            "image_count": 1,
            "instance_count": 1,
        }
        for number in random.permutation(np.arange(1, CLASSES + 1)).tolist()
    ]
    images, annotations = [], []
    for index in range(pictures):
        number = 1000 - 7 * index
        height, width = random.integers(30, 60, 2).tolist()
        split = "train2017" if index % 3 == 2 else "val2017"
        classes = random.permutation(np.arange(1, CLASSES + 1)).tolist()
        images.append(
            {
                "id": number,
                "coco_url": f"http://images.cocodataset.org/{split}/{number:012}.jpg",
                "flickr_url": "",
                "date_captured": "2013-11-14 17:02:52",
                "license": 1,
                "height": height,
                "width": width,
                "neg_category_ids": classes[: index % 5],
                "not_exhaustive_category_ids": classes[10 : 10 + index % 3],
            }
        )
        for _ in range(index * 2):  # the first picture has none
            parts = [polygon(random, height, width) for _ in range(random.integers(1, 4))]
            annotations.append(
                {
                    "image_id": number,
                    "category_id": classes[20 + random.integers(5)],
                    "segmentation": parts,
                    "bbox": [0.0, 0.0, 1.0, 1.0],
                    "area": 1.0,
                }
            )
    annotations = [annotations[i] for i in random.permutation(len(annotations))]
    for number, entry in enumerate(annotations, 1):
        entry["id"] = number
    return {
        "info": {"version": "v1"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def place(folder, content, *, split=True):
    """The json and its pictures, each of a colour of its own."""
    path = folder / "annotations" / "lvis_v1_val.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    for entry in content["images"]:
        name = entry["coco_url"].split("/")[-2:]
        file = folder / "images" / "/".join(name if split else name[1:])
        file.parent.mkdir(parents=True, exist_ok=True)
        color = (entry["id"] % 256, 0, 0)
        Image.new("RGB", (entry["width"], entry["height"]), color).save(file, quality=100)
    return path


def test_reading_equals_the_official_package(tmp_path, capsys):
    content = make_content()
    path = place(tmp_path, content)
    dataset, official = read(path, tmp_path / "images"), load_official()(str(path))
    assert capsys.readouterr().err == f"{path}: LVIS, 7 pictures, {CLASSES} classes\n"
    assert not dataset.skipped
    assert [p.id for p in dataset.pictures] == official.get_img_ids()
    assert [c.id for c in dataset.categories] == sorted(official.get_cat_ids())
    assert {c.id: c.name for c in dataset.categories} == {
        number: entry["name"] for number, entry in official.cats.items()
    }
    seen = 0
    for index, picture in enumerate(dataset.pictures):
        assert picture.file == tmp_path / "images" / Path(*picture.file.parts[-2:])
        assert picture.file.name == f"{picture.id:012}.jpg"
        entries = dataset.annotations(index)
        assert entries == official.img_ann_map[picture.id]
        assert [entry["id"] for entry in entries] == official.get_ann_ids([picture.id])
        target = dataset.target(index)
        masks = [official.ann_to_mask(entry) for entry in entries]
        assert target.size == picture.size
        assert len(target) == sum(mask.any() for mask in masks)
        assert [dataset.categories[label].id for label in target.labels.tolist()] == [
            entry["category_id"] for entry, mask in zip(entries, masks, strict=True) if mask.any()
        ]
        truth = np.array([mask for mask in masks if mask.any()]).reshape(-1, *picture.size)
        assert np.array_equal(target.masks.dense(picture.size).numpy(), truth)
        seen += len(target)
    assert seen > 30


def test_what_evaluation_needs_equals_the_official_package(tmp_path):
    path = place(tmp_path, make_content(1))
    dataset, official = read(path, tmp_path / "images", quiet=True), load_official()(str(path))
    ids = [category.id for category in dataset.categories]
    federated = dataset.federated
    assert len(federated.frequency) == CLASSES
    for group in "rcf":
        mine = {
            n for n, frequency in zip(ids, federated.frequency, strict=True) if frequency == group
        }
        theirs = {n for n, entry in official.cats.items() if entry["frequency"] == group}
        assert mine == theirs
        assert mine
    for key, lists in (
        ("neg_category_ids", federated.negative),
        ("not_exhaustive_category_ids", federated.not_exhaustive),
    ):
        assert any(lists)
        assert len(lists) == len(dataset)
        for picture, labels in zip(dataset.pictures, lists, strict=True):
            assert list(labels) == sorted(set(labels))
            assert {ids[label] for label in labels} == set(official.imgs[picture.id][key])
    assert pickle.loads(pickle.dumps(dataset)).federated == federated


def test_ground_truth_holds_every_mask(tmp_path):
    content = make_content(2)
    dataset, official = read(place(tmp_path, content), quiet=True), load_official()
    official = official(str(dataset.path))
    truth = dataset.ground_truth()["annotations"]
    masks = {entry["id"]: official.ann_to_mask(entry) for entry in content["annotations"]}
    order = [i for p in dataset.pictures for i in official.get_ann_ids([p.id]) if masks[i].any()]
    assert len(truth) == len(order) > 30
    for mine, number in zip(truth, order, strict=True):
        size = masks[number].shape
        columns = np.repeat(
            np.arange(len(counts := decode(mine["segmentation"], size).counts)) % 2, counts
        )
        assert np.array_equal(columns.reshape(size[::-1]).T, masks[number])


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_pictures_are_found_with_and_without_the_split(tmp_path, split, named):
    content = make_content()
    path = place(tmp_path, content, split=split)
    folder = tmp_path / "images" if named else None
    if not named:  # the folder images beside the json
        (tmp_path / "images").rename(path.parent / "images")
    dataset = read(path, folder, quiet=True)
    for index, picture in enumerate(dataset.pictures):
        pixels = read_labelled(dataset, index)
        assert abs(int(pixels[0, 0, 0]) - picture.id % 256) <= 3


def test_a_file_name_is_taken_where_there_is_no_url(tmp_path):
    content = make_content()
    path = place(tmp_path, content)
    for entry in content["images"]:
        entry["file_name"] = "/".join(entry.pop("coco_url").split("/")[-2:])
    path.write_text(json.dumps(content))
    assert all(p.file.is_file() for p in read(path, tmp_path / "images", quiet=True).pictures)
    for entry in content["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/elsewhere/{entry['id']}.jpg"
    path.write_text(json.dumps(content))
    assert all(p.file.is_file() for p in read(path, tmp_path / "images", quiet=True).pictures)


def test_a_missing_picture_is_named_where_it_was_expected(tmp_path):
    path = place(tmp_path, make_content())
    (tmp_path / "images/val2017/000000001000.jpg").unlink()
    dataset = read(path, tmp_path / "images", quiet=True)
    with pytest.raises(InputError, match=r"images/val2017/000000001000.jpg: no such picture$"):
        read_labelled(dataset, 0)


def test_annotations_are_not_copied(tmp_path):
    path = place(tmp_path, make_content())
    content = read_json(path, packed=True)
    annotations = content["annotations"]
    assert not any(isinstance(entry, dict) for entry in annotations)  # packed
    before = list(map(id, annotations))
    found = lvis.read(path, content=content)
    assert found is content
    assert found["annotations"] is annotations
    assert list(map(id, annotations)) == before


def test_a_coco_json_is_not_lvis(toy_set, capsys):
    dataset = read(toy_set / "val.json")
    assert dataset.federated is None
    assert not capsys.readouterr().err
    assert CocoSet(toy_set / "val.json").federated is None


@pytest.mark.parametrize("key", ["frequency", "neg_category_ids"])
def test_one_sign_of_lvis_is_enough(tmp_path, key):
    content = make_content()
    for entry in content["categories"] + content["images"]:
        entry.pop(key, None)
    path = place(tmp_path, content)
    with pytest.raises(InputError, match=f"{key} is missing$"):
        read(path)


# --- faults


def drop(name, index, key):
    return lambda content: content[name][index].pop(key)


def put(name, index, **values):
    return lambda content: content[name][index].update(values)


def last(key, value):
    """A list of the last picture with one more value."""
    return lambda content: content["images"][-1][key].append(value)


CATEGORY = make_content()["categories"][4]["id"]
BROKEN = {
    "no frequency": (
        drop("categories", 4, "frequency"), "missing-key", CATEGORY,
        f"category {CATEGORY}: frequency is missing",
    ),
    "unknown frequency": (
        put("categories", 4, frequency="x"), "bad-frequency", CATEGORY,
        f"category {CATEGORY}: frequency is x, expected r, c or f",
    ),
    "frequency as a list": (
        put("categories", 4, frequency=["r"]), "bad-frequency", CATEGORY,
        f'category {CATEGORY}: frequency is ["r"], expected r, c or f',
    ),
    "frequency is null": (
        put("categories", 4, frequency=None), "bad-frequency", CATEGORY,
        f"category {CATEGORY}: frequency is null, expected r, c or f",
    ),
    "no negatives": (
        drop("images", 2, "neg_category_ids"), "missing-key", 986,
        "picture 986: neg_category_ids is missing",
    ),
    "no list of the not exhaustive": (
        drop("images", 2, "not_exhaustive_category_ids"), "missing-key", 986,
        "picture 986: not_exhaustive_category_ids is missing",
    ),
    "negatives as a number": (
        put("images", 2, neg_category_ids=5), "wrong-type", 986,
        "picture 986: neg_category_ids is 5, expected a list of category ids",
    ),
    "not exhaustive is null": (
        put("images", 2, not_exhaustive_category_ids=None), "wrong-type", 986,
        "picture 986: not_exhaustive_category_ids is null, expected a list of category ids",
    ),
    "unknown negative": (
        last("neg_category_ids", 1204), "unknown-category", 958,
        "picture 958: neg_category_ids: no category has the id 1204",
    ),
    "not exhaustive as text": (
        last("not_exhaustive_category_ids", "7"), "unknown-category", 958,
        'picture 958: not_exhaustive_category_ids: no category has the id "7"',
    ),
    "a list as negative": (
        last("neg_category_ids", [7]), "unknown-category", 958,
        "picture 958: neg_category_ids: no category has the id [7]",
    ),
    "no url": (
        drop("images", 2, "coco_url"), "missing-key", 986, "picture 986: coco_url is missing",
    ),
    "an empty url": (
        put("images", 2, coco_url=""), "missing-key", 986, "picture 986: coco_url is missing",
    ),
    "a number as url": (
        put("images", 2, coco_url=3), "missing-key", 986, "picture 986: coco_url is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_one_line_and_the_rest_is_read(tmp_path, name):
    break_it, kind, number, message = BROKEN[name]
    content = make_content()
    whole = read(place(tmp_path, content), quiet=True)
    break_it(content)
    path = tmp_path / "annotations" / "broken.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: {message}"
    found = []
    given = lvis.read(path, report=lambda *fault: found.append(fault))
    assert found == [(kind, path, number, message)]
    assert given["annotations"]
    assert len(given["images"]) == len(whole)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda content: content.pop("images"), "images: missing"),
        (lambda content: content.update(images=4), "images: not a list"),
        (lambda content: content["images"].append(3), r"images\[7\]: expected an object"),
        (drop("images", 1, "height"), "picture 993: height is missing"),
        (put("images", 1, id=1000), "picture id 1000 is used twice"),
        (put("categories", 1, id=CATEGORY), f"category id {CATEGORY} is used twice"),
        (lambda content: content["categories"].append(None), r"categories\[1203\]: expected an"),
        (lambda content: content.pop("annotations"), "annotations: missing"),
    ],
)
def test_what_coco_refuses_is_refused(tmp_path, break_it, message):
    content = make_content()
    path = place(tmp_path, content)
    break_it(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def mutate(random, value):
    """A copy of a json value with something in it dropped, doubled or replaced."""
    value = copy.deepcopy(value)
    places = []

    def walk(inside):
        keys = inside if isinstance(inside, dict) else range(len(inside))
        for key in keys:
            places.append((inside, key))
            if isinstance(inside[key], dict | list):
                walk(inside[key])

    walk(value)
    strange = [None, True, -1, 0, 10**400, float("nan"), 2.5, "", "r", "\0", [], [[]], {}, [1204]]
    strange += [{"image_id": 1, "segmentation": []}]
    for inside, key in random.sample(places, random.randint(1, 3)):
        if isinstance(inside, dict) and random.random() < 0.3:
            inside.pop(key, None)
        else:
            inside[key] = random.choice(strange)
    return value


@pytest.mark.parametrize("seed", range(5))
def test_a_mutated_json_is_read_or_refused_in_one_line(tmp_path, seed):
    random = Random(seed)
    content = make_content(pictures=4)
    content["categories"] = content["categories"][:8]
    ids = [entry["id"] for entry in content["categories"]]
    for entry in content["images"]:
        entry |= {"neg_category_ids": ids[:2], "not_exhaustive_category_ids": ids[3:4]}
    for entry in content["annotations"]:
        entry["category_id"] = random.choice(ids)
    path, lines = place(tmp_path, content), []
    for _ in range(80):
        path.write_text(json.dumps(mutate(random, content)))
        try:
            dataset = read(path, quiet=True)
            if dataset.federated:
                assert len(dataset.federated.negative) == len(dataset)
                assert len(dataset.federated.frequency) == len(dataset.categories)
            for index in range(len(dataset)):
                dataset.target(index)
        except InputError as error:
            lines.append(str(error))
    assert all(line.startswith(str(path)) and "\n" not in line for line in lines)
    assert 10 < len(lines) < 75


def test_an_unusable_annotation_costs_itself_only(tmp_path, capsys):
    content = make_content()
    content["annotations"][0]["category_id"] = 5000
    content["annotations"][1]["segmentation"] = [[1, 2, 3]]
    dataset = read(place(tmp_path, content))
    assert len(dataset.skipped) == 2
    assert ", 2 unusable, first: annotation 1: unknown category_id 5000" in capsys.readouterr().err
