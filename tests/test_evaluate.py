import contextlib
import io
import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from brefine import evaluate as ev
from brefine.data.coco import CocoSet
from brefine.metrics import boundary, tables
from brefine.parts.masks import to_records
from brefine.predict import Predictor
from brefine.structures import Bitmaps, Category, InputError, Instances
from samples import (
    FakePicture,
    FakeSet,
    blob,
    dense_rle,
    detect,
    disc,
    random_records,
    random_set,
)

SIZE = (90, 120)


def dense_band(mask):
    """Reference: pad by one, erode d times with a 3 x 3 square, take the difference."""
    height, width = mask.shape
    distance = max(1, round(0.02 * math.sqrt(height**2 + width**2)))
    inner = np.pad(mask.astype(bool), 1)
    for _ in range(distance):
        wide = np.pad(inner, 1)
        inner = np.logical_and.reduce(
            [wide[y : y + height + 2, x : x + width + 2] for y in range(3) for x in range(3)]
        )
    return mask.astype(bool) & ~inner[1:-1, 1:-1]


class BoundaryEval(COCOeval):
    """pycocotools with Boundary IoU from the definition, on dense masks."""

    def computeIoU(self, image, category):
        truths, finds = self._gts[image, category], self._dts[image, category]
        if not truths or not finds:
            return []
        finds = sorted(finds, key=lambda found: -found["score"])
        return self.boundary_ious(finds[: self.params.maxDets[-1]], truths)

    @staticmethod
    def boundary_ious(finds, truths):
        ious = np.zeros((len(finds), len(truths)))
        for i, found in enumerate(finds):
            a = coco_mask.decode(found["segmentation"]).astype(bool)
            for j, true in enumerate(truths):
                b = coco_mask.decode(true["segmentation"]).astype(bool)
                shared = (a & b).sum()
                if true["iscrowd"]:
                    ious[i, j] = shared / max(a.sum(), 1)
                    continue
                edge_a, edge_b = dense_band(a), dense_band(b)
                edge = (edge_a & edge_b).sum() / max((edge_a | edge_b).sum(), 1)
                ious[i, j] = min(shared / max((a | b).sum(), 1), edge)
        return ious


def reference(dataset, records, kind):
    """The 12 figures of pycocotools, NaN for its -1."""
    truth = COCO()
    truth.dataset = json.loads(json.dumps(dataset.ground_truth()))
    records = json.loads(json.dumps(records))
    for record in records:
        record.pop("bbox" if kind != "box" else "segmentation")
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(records)
        make = BoundaryEval if kind == "boundary" else COCOeval
        result = make(truth, found, "bbox" if kind == "box" else "segm")
        result.evaluate()
        result.accumulate()
        result.summarize()
    names = ["AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"]
    names += ["AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L"]
    return {
        f"{kind}/{name}": math.nan if value == -1 else value
        for name, value in zip(names, result.stats, strict=True)
    }


def assert_same(values, expected):
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, abs=1e-9, nan_ok=True), key


def agree(dataset, records, kinds=("box", "mask", "boundary")):
    """A report that has been compared with pycocotools, figure by figure."""
    report = ev.evaluate_records(records, dataset)
    for kind in kinds:
        for key, value in reference(dataset, records, kind).items():
            assert report.values[key] == pytest.approx(value, abs=1e-9, nan_ok=True), key
    return report


def scene(*objects, size=SIZE, categories=("a", "b"), pictures=1):
    """A set of (picture, label, mask, crowd) tuples."""
    names = [Category(10 * i + 5, name) for i, name in enumerate(categories)]
    files = [FakePicture(i, Path(f"{i}.png"), size) for i in range(pictures)]
    return FakeSet(names, files, list(objects))


# --- average precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_ap_is_that_of_pycocotools(seed):
    dataset = random_set(seed, ids="int" if seed % 2 else "str")
    report = agree(dataset, random_records(dataset, seed))
    assert 0 < report.values["boundary/AP"] < report.values["mask/AP"] < 1
    assert report.values["box/AP"] > 0


def test_ap_with_more_than_100_detections():
    dataset = random_set(1, pictures=3, objects=8, classes=1)
    records = random_records(dataset, 1, copies=30, stray=120)
    assert max(sum(r["image_id"] == p.id for r in records) for p in dataset.pictures) > 150
    agree(dataset, records)


def test_more_than_100_detections_are_cut_by_score():
    mask = disc(60, 45, 20)
    dataset = scene((0, 0, mask, False))
    wrong = [detect(dataset, disc(20, 20, 8), 0.9)] * 100
    assert ev.evaluate_records([*wrong, detect(dataset, mask, 0.1)], dataset).values["mask/AP"] == 0
    kept = ev.evaluate_records([*wrong[1:], detect(dataset, mask, 0.1)], dataset)
    assert kept.values["mask/AP"] == pytest.approx(1 / 100)


def test_ap_without_small_and_large_objects_is_nan_there():
    masks = [disc(30, 40, 20), disc(80, 50, 25)]
    dataset = scene(*((0, i, mask, False) for i, mask in enumerate(masks)))
    records = [detect(dataset, mask, 0.5, i) for i, mask in enumerate(masks)]
    report = agree(dataset, records)
    for kind in ("box", "mask", "boundary"):
        assert report.values[f"{kind}/AP_M"] == 1
        assert math.isnan(report.values[f"{kind}/AP_S"])
        assert math.isnan(report.values[f"{kind}/AP_L"])


def test_perfect_masks_score_one_everywhere():
    dataset = random_set(2, crowds=False)
    records = [
        detect(dataset, m, 0.9 - 0.01 * i, label, picture)
        for i, (picture, label, m, _) in enumerate(dataset.objects)
    ]
    report = agree(dataset, records)
    assert report.values["mask/AP"] == report.values["boundary/AP"] == pytest.approx(1)


def test_equal_scores_are_ranked_by_picture_id_then_by_order():
    masks = [disc(30, 40, 20), disc(80, 50, 25)]
    dataset = scene(*((i, 0, m, False) for i, m in enumerate(masks)), pictures=2)
    for ids in ((9, 10), (10, 9), ("9", "10"), ("b", "a")):
        dataset.pictures = [FakePicture(i, None, SIZE) for i in ids]
        right, wrong = detect(dataset, masks[0], 0.5), detect(dataset, masks[0], 0.5, picture=1)
        for records in ([right, wrong], [wrong, right]):
            agree(dataset, records)


def test_crowd_takes_any_number_of_detections_and_is_no_object():
    crowd, mask = disc(30, 40, 25), disc(90, 45, 20)
    dataset = scene((0, 0, crowd, True), (0, 0, mask, False))
    inside = [detect(dataset, disc(30, 40, r), 0.9) for r in (5, 8, 12)]
    report = agree(dataset, [*inside, detect(dataset, mask, 0.5)])
    assert report.values["mask/AP"] == report.values["boundary/AP"] == 1
    assert report.per_class["a"]["objects"] == 1
    assert report.thresholds[0] == 0.5


def test_no_detections_and_no_objects():
    mask = disc(60, 45, 20)
    objects, empty = scene((0, 0, mask, False)), scene()
    report = ev.evaluate_records([], objects)
    assert report.values["mask/AP"] == report.values["boundary/AP"] == 0
    assert report.thresholds == [0.5, 0.5]
    for dataset in (empty, scene((0, 0, mask, True))):
        for records in ([], [detect(dataset, mask, 0.5)]):
            report = ev.evaluate_records(records, dataset)
            assert all(math.isnan(value) for value in report.values.values())
            assert report.thresholds == [0.5, 0.5]
    report = ev.evaluate_records([], FakeSet([], []))
    assert math.isnan(report.values["mask/AP"])


def test_empty_masks_are_wrong_detections():
    mask = disc(60, 45, 20)
    dataset = scene((0, 0, mask, False), (0, 0, disc(20, 20, 10), True))
    records = [detect(dataset, np.zeros(SIZE), 0.9), detect(dataset, mask, 0.5)]
    assert agree(dataset, records, ("mask", "boundary")).values["mask/AP"] == pytest.approx(0.5)


def test_per_class_figures_are_those_of_the_class_alone():
    dataset = random_set(4, classes=3)
    records = random_records(dataset, 4)
    report = ev.evaluate_records(records, dataset)
    alone = report.per_class
    assert list(alone) == ["class 0", "class 1", "class 2"]
    for i, category in enumerate(dataset.categories):
        objects = [o for o in dataset.objects if o[1] == i]
        part = FakeSet([category], dataset.pictures, [(p, 0, m, c) for p, _, m, c in objects])
        mine = [r for r in records if r["category_id"] == category.id]
        expected = ev.evaluate_records(mine, part)
        for key, value in expected.values.items():
            if "AP" in key or "AR" in key:  # thresholds borrow from other classes
                assert alone[category.name][key] == pytest.approx(value, abs=1e-12, nan_ok=True)
        assert alone[category.name]["objects"] == sum(not crowd for *_, crowd in objects)
    mean = np.mean([values["mask/AP"] for values in alone.values()])
    assert report.values["mask/AP"] == pytest.approx(mean)


def test_classes_of_one_name_stay_apart():
    dataset = scene((0, 0, disc(60, 45, 20), False), categories=("a", "a"))
    assert list(ev.evaluate_records([], dataset).per_class) == ["a (5)", "a (15)"]


def test_area_of_a_detection_is_its_masks_and_boxes_have_their_own():
    mask = np.zeros(SIZE, bool)
    mask[10:60, 10:12] = mask[58:60, 10:80] = True  # an L: small mask in a large box
    dataset = scene((0, 0, mask, False))
    report = agree(dataset, [detect(dataset, mask, 0.5), detect(dataset, disc(90, 30, 12), 0.9)])
    assert report.values["mask/AP_S"] == 0.5


# --- boundary ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)),
    st.integers(1, 6),
    st.booleans(),
)
def test_band_is_repeated_erosion(mask, width, smooth):
    if smooth:  # random pixels have no inside: fill them up
        mask = np.pad(mask, 2).cumsum(0).cumsum(1) > 0
    inner = np.pad(mask, 1)
    for _ in range(width):
        wide = np.pad(inner, 1)
        shape = inner.shape
        inner = np.logical_and.reduce(
            [wide[y : y + shape[0], x : x + shape[1]] for y in range(3) for x in range(3)]
        )
    expected = mask & ~inner[1:-1, 1:-1]
    before = mask.astype(np.uint8)
    np.testing.assert_array_equal(boundary.boundary_band(before, width), expected)
    np.testing.assert_array_equal(before, mask)


@pytest.mark.parametrize("seed", range(5))
def test_band_in_a_window_is_that_in_the_picture(seed):
    random = np.random.default_rng(seed)
    size = (60 + 70 * seed, 80 + 50 * seed)
    for _ in range(6):
        mask = blob(random, size)
        window = Bitmaps.of(torch.as_tensor(mask[None]))
        x, y = window.origins[0].tolist()
        band = boundary.boundary_band(window.windows[0].numpy(), boundary.band_width(size))
        expected = dense_band(mask)
        assert band.sum() == expected.sum()
        part = expected[y : y + band.shape[0], x : x + band.shape[1]]
        np.testing.assert_array_equal(band, part)


def test_band_width_is_two_percent_of_the_diagonal():
    assert boundary.band_width((480, 640)) == 16
    assert boundary.band_width((3, 4)) == 1
    assert boundary.band_width((300, 400)) == 10


def test_the_pictures_border_is_outline():
    size = (300, 400)  # d = 10
    whole = np.ones(size, np.uint8)
    band = boundary.boundary_band(whole, boundary.band_width(size))
    assert band.sum() == 300 * 400 - 280 * 380


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_mask_iou_of_windows_is_the_dense_one(data):
    masks, windows = [], []
    for _ in range(2):
        mask = data.draw(hnp.arrays(bool, (9, 11)))
        corner = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 11)))
        mask[: corner[0]] = mask[:, : corner[1]] = False
        bitmap = Bitmaps.of(torch.as_tensor(mask[None]))
        masks.append(mask)
        windows.append((bitmap.windows[0].numpy(), tuple(bitmap.origins[0].tolist())))
    union = (masks[0] | masks[1]).sum()
    expected = (masks[0] & masks[1]).sum() / union if union else 0.0
    assert boundary.mask_iou(*windows) == pytest.approx(expected)
    assert boundary.mask_iou(*windows[::-1]) == pytest.approx(expected)


# --- thresholds ----------------------------------------------------------------------------------


def test_threshold_has_the_best_f1():
    masks = [disc(20 + 22 * i, 45, 9) for i in range(4)]
    dataset = scene(*((0, 0, m, False) for m in masks))
    wrong = disc(60, 80, 6)
    records = [
        detect(dataset, masks[0], 0.9),
        detect(dataset, masks[0], 0.85),  # a duplicate is wrong
        detect(dataset, masks[1], 0.8),
        detect(dataset, masks[2], 0.7),
        *[detect(dataset, wrong, 0.6)] * 5,
        detect(dataset, masks[3], 0.5),
    ]
    # At 0.7: 3 right of 4, F1 = 6/8. At 0.5: 4 right of 10, F1 = 8/14.
    assert ev.evaluate_records(records, dataset).thresholds == [0.7, 0.7]
    # Equal scores are kept or dropped together.
    tied = [*records[:3], *[detect(dataset, wrong, 0.7)] * 9, records[3]]
    assert ev.evaluate_records(tied, dataset).thresholds[0] == 0.8


@pytest.mark.parametrize("seed", range(4))
def test_threshold_against_trying_all(seed):
    dataset = random_set(seed, classes=1)
    records = random_records(dataset, seed)
    found = ev.evaluate_records(records, dataset).thresholds
    for label, category in enumerate(dataset.categories):
        mine = [r for r in records if r["category_id"] == category.id]
        f1 = {}
        for score in sorted({r["score"] for r in mine}, reverse=True):
            right = total = objects = 0
            for index, picture in enumerate(dataset.pictures):
                kept = [r for r in mine if r["image_id"] == picture.id and r["score"] >= score]
                kept.sort(key=lambda r: -r["score"])
                true = [(m, c) for i, n, m, c in dataset.objects if (i, n) == (index, label)]
                objects += sum(not crowd for _, crowd in true)
                taken = set()
                for record in kept:
                    mask = coco_mask.decode(record["segmentation"]).astype(bool)
                    ious = [
                        0 if i in taken or crowd else (mask & m).sum() / (mask | m).sum()
                        for i, (m, crowd) in enumerate(true)
                    ]
                    crowded = any(
                        c and (mask & m).sum() >= 0.5 * max(mask.sum(), 1) for m, c in true
                    )
                    if ious and max(ious) >= 0.5:
                        taken.add(int(np.argmax(ious)))
                        right += 1
                        total += 1
                    elif not crowded:
                        total += 1
            f1[score] = 2 * right / (total + objects)
        best = max(f1.values())
        assert found[label] == max(s for s, value in f1.items() if value == pytest.approx(best))


# --- masks in true boxes -------------------------------------------------------------------------


class Perfect:
    """A predictor whose logits are the true masks, maybe shifted to the right by pixels.

    Exact where the sides of a mask's window divide those of the grid.
    """

    def __init__(self, dataset, grid=168, shift=0.0):
        self.dataset, self.grid, self.shift = dataset, grid, shift
        self.categories = dataset.categories
        self.asked, self.labels = [], []

    def given(self, picture, target):
        self.asked.append(picture)
        self.labels += target.labels.tolist()
        logits = torch.full((len(target), self.grid, self.grid), -1.0)
        for logit, window in zip(logits, target.masks.windows, strict=True):
            soft = torch.nn.functional.interpolate(window[None, None].float() * 2 - 1, logit.shape)
            logit.copy_(soft[0, 0])
        move = torch.tensor([self.shift, 0, self.shift, 0])
        return Instances(
            target.size, target.boxes + move, target.labels, torch.ones(len(target)), logits=logits
        )

    def detect(self, picture, *, threshold=None):
        assert threshold == 0
        index = [p.file for p in self.dataset.pictures].index(picture)
        found = self.dataset.target(index)
        rows = torch.tensor([self.categories.index(c) for c in self.dataset.categories])
        return replace(found, labels=rows[found.labels], scores=torch.full((len(found),), 0.9))

    def both(self, picture, target):
        return self.detect(picture, threshold=0), self.given(picture, target)


def three_sizes():
    size = (300, 400)  # d = 10
    masks = [
        disc(40.5, 40.5, 14, size),  # windows of 28, 84 and 168 pixels
        disc(120.5, 200.5, 42, size),
        disc(270.5, 150.5, 84, size),
    ]
    objects = [(0, 0, m, False) for m in masks] + [(0, 0, disc(40, 250, 30, size), True)]
    return scene(*objects, size=size, pictures=2), masks


def test_true_masks_have_quality_one():
    dataset, _ = three_sizes()
    quality = ev.mask_quality(Perfect(dataset), dataset, progress=False)
    assert set(quality) == {
        f"given_boxes/{name}{size}"
        for name in ("mask_iou", "boundary_iou")
        for size in ("", "_S", "_M", "_L")
    }
    assert all(value == 1 for value in quality.values())


def test_quality_of_shifted_masks_is_that_of_dense_masks():
    dataset, masks = three_sizes()
    quality = ev.mask_quality(Perfect(dataset, shift=6.0), dataset, progress=False)
    whole, bands = [], []
    for mask in masks:
        moved = np.roll(mask, 6, 1)
        whole.append((mask & moved).sum() / (mask | moved).sum())
        a, b = dense_band(mask), dense_band(moved)
        bands.append((a & b).sum() / (a | b).sum())
    for name, ious in (("mask_iou", whole), ("boundary_iou", bands)):
        for size, iou in zip("SML", ious, strict=True):
            assert quality[f"given_boxes/{name}_{size}"] == pytest.approx(iou)
        assert quality[f"given_boxes/{name}"] == pytest.approx(np.mean(ious))
    assert quality["given_boxes/boundary_iou_L"] < quality["given_boxes/mask_iou_L"] - 0.2


def test_evaluate_runs_the_model_once_a_picture():
    dataset, _ = three_sizes()
    predictor = Perfect(dataset)
    report = ev.evaluate(predictor, dataset, progress=False)
    assert report.values["mask/AP"] == report.values["boundary/AP"] == 1
    assert report.values["given_boxes/mask_iou"] == 1
    assert len(predictor.asked) == 1  # the second picture has no objects
    assert len(report.records) == 3
    assert report.values["masks/touching"] == 1  # perfect masks in tight boxes
    report = ev.evaluate(predictor, dataset, given_boxes=False, boundary=False, progress=False)
    kinds = {key.split("/")[0] for key in report.values}
    assert kinds == {"box", "mask", "masks", "threshold", "calibration"}
    assert len(predictor.asked) == 1


def test_limit_takes_the_first_pictures():
    masks = [disc(30, 40, 20), disc(80, 50, 25)]
    dataset = scene(*((i, 0, m, False) for i, m in enumerate(masks)), pictures=2)
    dataset.pictures = dataset.pictures[::-1]  # file order, not that of the ids, counts
    report = ev.evaluate(Perfect(dataset), dataset, limit=1, progress=False)
    assert report.values["mask/AP"] == 1
    assert report.per_class["a"]["objects"] == 1
    assert [record["image_id"] for record in report.records] == [1]


def test_model_may_know_more_classes_in_another_order():
    mask = disc(60, 45, 20)
    dataset = scene((0, 0, mask, False), (0, 1, disc(20, 20, 9), False))
    predictor = Perfect(dataset)
    predictor.categories = [Category(99, "z"), dataset.categories[1], dataset.categories[0]]
    seen = predictor.both

    def with_stray(picture, target):
        found, filled = seen(picture, target)
        twice = found[torch.tensor([0, 0, 1])]
        return replace(twice, labels=torch.tensor([0, 2, 1])), filled

    predictor.both = with_stray
    report = ev.evaluate(predictor, dataset, progress=False)
    assert report.values["mask/AP"] == 1
    assert predictor.labels == [2, 1]
    assert len(report.records) == 2


@pytest.mark.parametrize("table", [[], [Category(5, "a")], [Category(5, "a"), Category(15, "c")]])
def test_model_without_a_class_of_the_set_is_refused(table):
    dataset = scene((0, 0, disc(60, 45, 20), False))
    predictor = Perfect(dataset)
    predictor.categories = table
    with pytest.raises(InputError, match=r"labels.json: category \d+ \([ab]\) is not in the model"):
        ev.evaluate(predictor, dataset, progress=False)
    assert predictor.asked == []


def test_a_real_model_on_a_real_set(toy_set, tiny_models):
    dataset = CocoSet(toy_set / "val.json")
    report = ev.evaluate(Predictor.load(tiny_models["brefine"]), dataset)
    assert report.records
    assert all(0 <= value <= 1 or math.isnan(value) for value in report.values.values())
    assert 0 < report.values["given_boxes/mask_iou"] < 1
    again = ev.mask_quality(Predictor.load(tiny_models["brefine"]), dataset)
    assert again == pytest.approx({key: report.values[key] for key in again}, nan_ok=True)
    for index, picture in enumerate(dataset.pictures):
        true = to_records(dataset.target(index), picture.id, dataset.categories, picture.size)
        report.records.extend(true)
    perfect = ev.evaluate_records([r for r in report.records if r["score"] == 1], dataset)
    assert perfect.values["mask/AP"] == perfect.values["boundary/AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(31, 33, "S"), (32, 32, "M"), (95, 97, "M"), (96, 96, "L")]
)
def test_sizes_of_objects_are_cocos(height, width, size):
    mask = np.zeros((120, 130), bool)
    mask[10 : 10 + height, 10 : 10 + width] = True
    dataset = scene((0, 0, mask, False), size=mask.shape)
    quality = ev.mask_quality(Perfect(dataset), dataset, progress=False)
    measured = [name for name in "SML" if quality[f"given_boxes/mask_iou_{name}"] > 0.9]
    assert measured == [size]


def test_no_objects_have_no_quality():
    dataset = scene()
    quality = ev.mask_quality(Perfect(dataset), dataset, progress=False)
    assert all(math.isnan(value) for value in quality.values())


# --- results of others ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 77}, "image_id 77 is not in the data set"),
        ({"image_id": [1]}, r"image_id \[1\] is not in the data set"),
        ({"category_id": 6}, "category_id 6 is not in the data set"),
        ({"score": float("nan")}, "score nan"),
        ({"score": 10**400}, "score 1000"),
        ({"score": "0.5"}, "score '0.5'"),
        ({"bbox": [1, 2, 3]}, r"bbox \[1, 2, 3\]"),
        ({"bbox": None}, "bbox None"),
        ({"segmentation": None}, "segmentation"),
        ({"segmentation": {"size": [5, 5], "counts": [25]}}, "original size"),
        ({"segmentation": {"size": list(SIZE), "counts": [3, 4]}}, "7 pixels"),
        ({"segmentation": {"size": list(SIZE), "counts": "\x00\xff"}}, "RLE"),
        ({"segmentation": {"size": list(SIZE)}}, "RLE"),
    ],
)
def test_wrong_results_are_named(change, message):
    dataset = scene((0, 0, disc(60, 45, 20), False))
    good = detect(dataset, disc(60, 45, 20), 0.5)
    with pytest.raises(InputError, match=message) as caught:
        ev.evaluate_records([good, good | change], dataset)
    assert str(caught.value).startswith("result 1 ")
    assert "\n" not in str(caught.value)
    key = next(iter(change))
    without = {k: v for k, v in good.items() if k != key}
    if key != "bbox":
        with pytest.raises(InputError, match=f"key '{key}' is missing"):
            ev.evaluate_records([without], dataset)


def test_results_without_boxes_and_with_other_forms_of_masks():
    mask = disc(60, 45, 20)
    dataset = scene((0, 0, mask, False))
    rle = dense_rle(mask)
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    polygon = [[40.0, 25.0, 80.0, 25.0, 80.0, 65.0, 40.0, 65.0]]
    forms = [rle, rle | {"counts": rle["counts"].encode()}, {"size": list(SIZE), "counts": counts}]
    for form in [*forms, polygon]:
        record = {"image_id": 0, "category_id": 5, "score": 0.5, "segmentation": form}
        report = ev.evaluate_records([record], dataset)
        assert report.values["box/AP"] == (
            1 if form is not polygon else pytest.approx(0.9, abs=0.2)
        )
        assert report.values["mask/AP50"] == 1


def test_arguments_stay_as_they_were():
    dataset = random_set(5)
    records = random_records(dataset, 5)
    before = json.dumps(records)
    report = ev.evaluate_records(records, dataset)
    assert json.dumps(records) == before == json.dumps(report.records)


# --- tables --------------------------------------------------------------------------------------


def two_reports():
    dataset = random_set(6)
    dataset.objects = [o for o in dataset.objects if o[2].sum() < 96**2]
    good, bad = (ev.evaluate_records(random_records(dataset, s), dataset) for s in (1, 2))
    good.values["given_boxes/mask_iou"] = 0.98765
    return {"[Mask] R-CNN": bad, "BRefine": good}


@pytest.mark.parametrize("width", [80, 200])
def test_table_fits_a_terminal(width):
    rows = two_reports()
    rows["BRefine"].values["given_boxes/boundary_iou"] = 0.7654
    rows["[Mask] R-CNN"].values["masks/touching"] = 0.25
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    tables.print_table(rows, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    (first,) = (line for line in lines if line.startswith("[Mask] R-CNN"))
    (second,) = (line for line in lines if line.startswith("BRefine"))
    assert len(second.split()) == 11
    values = rows["BRefine"].values
    figures = [100 * values[k] for k in tables.COLUMNS if k in values and k != "mask/AP_L"]
    assert [w for w in second.split()[1:] if w != "-"] == [f"{v:.1f}" for v in figures]
    assert second.split()[6] == "-"  # no large objects
    assert len(first.split()) == 10  # the masks in true boxes were not measured: blank
    assert lines[-2] == "- : no such object in the set"
    assert lines[-1] == "25.0 % of the masks of [Mask] R-CNN reach the edge of their RoI"
    assert "…" not in console.file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_every_figure_is_printed_for_every_kind(width):
    report = two_reports()["BRefine"]
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    tables.print_kinds({"one": report}, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    order = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
    order += ("AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")
    assert lines[0].split() == ["AP", "AP", "AP", "AR", "AR", "AR"]
    for kind in ("mask", "boundary", "box"):
        (line,) = (line for line in lines if line.startswith(kind))
        values = [100 * report.values[f"{kind}/{figure}"] for figure in order]
        assert line.split()[1:] == ["-" if math.isnan(v) else f"{v:.1f}" for v in values]
    assert lines[-1] == tables.NONE
    assert lines[-2].startswith("box")
    tables.print_kinds(two_reports(), console)
    assert "[Mask] R-CNN" in console.file.getvalue()
    assert console.file.getvalue().count("\nboundary") == 3


def test_a_table_without_dashes_explains_none():
    dataset, masks = three_sizes()
    dataset.categories = dataset.categories[:1]
    report = ev.evaluate_records([detect(dataset, mask, 0.5) for mask in masks], dataset)
    assert not any(math.isnan(value) for value in report.values.values())
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    tables.print_table({"one": report}, console)
    tables.print_kinds({"one": report}, console)
    tables.print_classes({"one": ev.evaluate_records([], dataset)}, console)
    assert tables.NONE not in console.file.getvalue()


def test_class_table_has_all_methods():
    rows = two_reports()
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    tables.print_classes(rows, console)
    (line,) = (x for x in console.file.getvalue().splitlines() if x.startswith("class 2"))
    values = [
        100 * rows[name].per_class["class 2"][f"{kind}/AP"]
        for kind in ("mask", "boundary", "box")
        for name in rows
    ]
    assert line.split()[3:] == [f"{value:.1f}" for value in values]
    assert int(line.split()[2]) == rows["BRefine"].per_class["class 2"]["objects"]
    assert "[Mask]" in console.file.getvalue()
    tables.print_table({}, console)
    tables.print_classes({}, console)


def test_markdown_table_has_the_best_in_bold():
    rows = two_reports()
    lines = tables.markdown(rows).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    values = [report.values["mask/AP"] for report in rows.values()]
    first = lines[2 + int(np.argmax(values))].split("|")[2].strip()
    assert first == f"**{100 * max(values):.1f}**"
    only = tables.markdown({"one": rows["BRefine"]})
    assert "**" not in only


def test_report_as_json_has_no_nan():
    report = two_reports()["BRefine"]
    text = json.dumps(report.as_dict(), allow_nan=False)
    assert json.loads(text)["values"]["mask/AP_L"] is None
    assert json.loads(text)["thresholds"] == report.thresholds


def test_memory_follows_the_objects_not_the_picture():
    size = (6000, 8000)
    mask = np.zeros(size, np.uint8)
    mask[100:140, 100:140] = 1
    dataset = scene((0, 0, mask, False), size=size)
    truth, records = dataset.ground_truth(), [detect(dataset, mask, 0.5)] * 100
    dataset.ground_truth = lambda: truth
    tracemalloc.start()
    report = ev.evaluate_records(records, dataset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.values["boundary/AP50"] == 1
    assert peak < mask.nbytes / 8  # one mask of the picture's size is 48 MB
