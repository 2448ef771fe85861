"""LVIS figures against the `lvis` package, on generated federated sets."""

import json
import math

import numpy as np
import pytest

from brefine import evaluate as ev
from brefine.data.lvis import Federated
from brefine.metrics.overlaps import compare
from brefine.structures import Category
from samples import FakePicture, FakeSet, blob, detect, disc, random_records, random_set
from test_evaluate import BoundaryEval

lvis = pytest.importorskip("lvis", reason="needs the package lvis: pip install -e '.[dev]'")

FIGURES = {
    "AP": "AP", "AP50": "AP50", "AP75": "AP75", "APs": "AP_S", "APm": "AP_M", "APl": "AP_L",
    "APr": "AP_r", "APc": "AP_c", "APf": "AP_f",
    "AR@300": "AR300", "ARs@300": "AR_S", "ARm@300": "AR_M", "ARl@300": "AR_L",
}  # fmt: skip


class LvisBoundary(lvis.LVISEval):
    """The package with Boundary IoU from the definition, on dense masks."""

    def compute_iou(self, image, category):
        truths, finds = self._get_gt_dt(image, category)
        if not truths or not finds:
            return []
        finds = sorted(finds, key=lambda found: -found["score"])
        return BoundaryEval.boundary_ious(finds, [{**true, "iscrowd": 0} for true in truths])


@pytest.fixture(autouse=True)
def _numpy_of_its_day(monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)  # what the package still calls


def federate(dataset, seed):
    """Frequencies, absent and not exhaustively labelled classes for a set."""
    random = np.random.default_rng(seed)
    classes = len(dataset.categories)
    frequency = tuple("rcf"[i % 3] for i in range(classes))
    negative, partial = [], []
    for index in range(len(dataset)):
        here = {label for i, label, *_ in dataset.objects if i == index}
        absent = [k for k in range(classes) if k not in here and random.random() < 0.4]
        negative.append(tuple(absent))
        partial.append(tuple(k for k in sorted(here) if random.random() < 0.4))
    dataset.federated = Federated(frequency, tuple(negative), tuple(partial))
    return dataset


def reference(dataset, records, kind):
    """The figures of the package, NaN for its -1."""
    content = json.loads(json.dumps(dataset.ground_truth()))
    ids = [category.id for category in dataset.categories]
    rows = {category.id: i for i, category in enumerate(dataset.categories)}
    federated = dataset.federated
    for category in content["categories"]:
        category["frequency"] = federated.frequency[rows[category["id"]]]
    for i, image in enumerate(content["images"]):
        image["neg_category_ids"] = [ids[k] for k in federated.negative[i]]
        image["not_exhaustive_category_ids"] = [ids[k] for k in federated.not_exhaustive[i]]
    truth = lvis.LVIS.__new__(lvis.LVIS)
    truth.logger, truth.dataset = lvis.lvis.logging.getLogger("lvis"), content
    truth._create_index()
    records = json.loads(json.dumps(records))
    for record in records:
        record.pop("bbox" if kind != "box" else "segmentation")
    make = LvisBoundary if kind == "boundary" else lvis.LVISEval
    result = make(truth, lvis.LVISResults(truth, records), "bbox" if kind == "box" else "segm")
    result.run()
    figures = result.get_results()
    return {
        f"{kind}/{ours}": math.nan if figures[theirs] == -1 else figures[theirs]
        for theirs, ours in FIGURES.items()
    }


def agree(dataset, records):
    report = ev.evaluate_records(records, dataset)
    for kind in ("box", "mask", "boundary"):
        for key, value in reference(dataset, records, kind).items():
            assert report.values[key] == pytest.approx(value, abs=1e-9, nan_ok=True), key
    return report


@pytest.mark.parametrize("seed", range(6))
def test_figures_are_those_of_the_lvis_package(seed):
    dataset = federate(random_set(seed, classes=7, objects=9, crowds=False), seed)
    report = agree(dataset, random_records(dataset, seed, stray=12))
    assert 0 < report.values["boundary/AP"] < report.values["mask/AP"] < 1
    assert "mask/AR100" not in report.values
    plain = FakeSet(dataset.categories, dataset.pictures, dataset.objects)
    without = ev.evaluate_records(report.records, plain)
    assert without.values["mask/AP"] < report.values["mask/AP"]
    assert "mask/AP_r" not in without.values


def test_three_hundred_detections_of_all_classes_count():
    dataset = federate(random_set(3, pictures=3, objects=9, classes=5, crowds=False), 3)
    records = random_records(dataset, 3, copies=25, stray=300)
    assert max(sum(r["image_id"] == p.id for r in records) for p in dataset.pictures) > 320
    agree(dataset, records)
    # Also those of classes that do not count take a place.
    mask, size = disc(60, 45, 20), (90, 120)
    categories = [Category(1, "here"), Category(2, "elsewhere")]
    one = FakeSet(categories, [FakePicture(1, None, size)], [(0, 0, mask, False)])
    one.federated = Federated(("r", "f"), ((),), ((),))
    strays = [detect(one, disc(20, 20, 8), 0.9, label=1)] * 300
    found = detect(one, mask, 0.5)
    assert agree(one, [*strays, found]).values["mask/AP"] == 0
    assert agree(one, [*strays[1:], found]).values["mask/AP"] == 1


def test_only_classes_that_a_picture_was_labelled_for_count():
    size, mask, wrong = (90, 120), disc(60, 45, 20), disc(20, 20, 9)
    categories = [Category(i, name) for i, name in enumerate("abc")]
    pictures = [FakePicture(i, None, size) for i in (1, 2)]
    dataset = FakeSet(categories, pictures, [(0, 0, mask, False), (1, 1, mask, False)])
    right = [detect(dataset, mask, 0.5), detect(dataset, mask, 0.5, 1, 1)]
    stray = detect(dataset, wrong, 0.9, 1)  # class b in the first picture

    def ap(negative, partial):
        dataset.federated = Federated(tuple("rcf"), negative, partial)
        return agree(dataset, [stray, *right]).values

    unknown = ap(((), ()), ((), ()))
    assert unknown["mask/AP"] == unknown["mask/AP_r"] == unknown["mask/AP_c"] == 1
    assert math.isnan(unknown["mask/AP_f"])
    assert ap(((1,), ()), ((), ()))["mask/AP_c"] == pytest.approx(0.5)
    excused = ap(((1,), ()), ((1,), ()))
    assert excused["mask/AP_c"] == 1
    overlaps = next(compare([stray, *right], dataset))
    assert overlaps.excused["mask"].tolist() == [True, False]


def test_thresholds_leave_out_what_does_not_count():
    size, mask = (90, 120), disc(60, 45, 20)
    dataset = FakeSet([Category(1, "a")], [FakePicture(1, None, size)], [(0, 0, mask, False)])
    strays = [detect(dataset, disc(20, 20, 9), score) for score in (0.9, 0.8)]
    dataset.federated = Federated(("f",), ((),), ((0,),))
    assert ev.evaluate_records([*strays, detect(dataset, mask, 0.5)], dataset).thresholds == [0.5]


def test_a_federated_set_without_detections():
    random = np.random.default_rng(0)
    dataset = FakeSet([Category(1, "a")], [FakePicture(1, None, (90, 120))])
    dataset.objects.append((0, 0, blob(random, (90, 120)), False))
    dataset.federated = Federated(("c",), ((),), ((),))
    values = ev.evaluate_records([], dataset).values
    assert values["mask/AP"] == values["mask/AP_c"] == values["mask/AR300"] == 0
    assert math.isnan(values["mask/AP_r"])
