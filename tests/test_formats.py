import csv
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from brefine.evaluate import evaluate_records
from brefine.formats.rasters import write_idmap
from brefine.formats.records import Predicted, write_coco
from brefine.structures import Category, InputError
from samples import dense_rle, random_records, random_set

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
