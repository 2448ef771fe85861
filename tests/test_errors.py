import math
from pathlib import Path

import numpy as np
import pytest

from brefine.data.lvis import Federated
from brefine.evaluate import evaluate_records
from brefine.metrics.errors import ERRORS, ErrorTally, judge
from brefine.metrics.overlaps import compare
from brefine.structures import Category
from samples import FakePicture, FakeSet, dense_rle, random_records, random_set

SIZE = (120, 160)


def scene(*objects, pictures=2, classes=3):
    """A set of (picture, label, mask, crowd)."""
    names = [Category(10 * i + 5, f"class {i}") for i in range(classes)]
    files = [FakePicture(i + 1, Path(f"{i}.png"), SIZE) for i in range(pictures)]
    return FakeSet(names, files, list(objects))


def detect(dataset, picture, label, mask, score):
    return {
        "image_id": dataset.pictures[picture].id,
        "category_id": dataset.categories[label].id,
        "score": score,
        "segmentation": dense_rle(mask),
    }


def block(x, y, width=20, height=20):
    mask = np.zeros(SIZE, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


#: two pictures with the same six objects each, two of every class
PLACES = [(i % 3, 5 + 50 * (i % 3), 10 + 60 * (i // 3)) for i in range(6)]
ALL = [(picture, label, x, y) for picture in range(2) for label, x, y in PLACES]


def six(change=None):
    """The set, and detections of all objects but those that ``change`` turns into others.

    ``change(i, label, x, y)`` gives the (label, mask, score) of the detections of object i.
    """
    dataset = scene(*((p, label, block(x, y), False) for p, label, x, y in ALL))
    records = []
    for i, (picture, label, x, y) in enumerate(ALL):
        drawn = change(i, label, x, y) if change else None
        if drawn is None:
            drawn = [(label, block(x, y), 0.9 - 0.01 * i)]
        records += [detect(dataset, picture, *one) for one in drawn]
    return dataset, records


def tally(dataset, records, thresholds=None, most=6):
    collected = ErrorTally(thresholds or [0.0] * len(dataset.categories), most)
    for overlaps in compare(records, dataset, kinds=("mask", "boundary"), across=True):
        collected.add(overlaps)
    return collected


def only(kind, number, dataset, records, lost=None):
    """Assert that there is one kind of error, and that it costs all that AP lost."""
    found = tally(dataset, records)
    values = evaluate_records(records, dataset).values
    assert found.ap50() == pytest.approx(values["mask/AP50"], abs=1e-12)
    assert dict(zip(ERRORS, found.counts[0].tolist(), strict=True)) == {
        name: number * (name == kind) for name in ERRORS
    }
    np.testing.assert_array_equal(*found.counts)
    lost = 1 - values["mask/AP50"] if lost is None else lost
    assert lost > 0.02
    expected = {name: lost if name == kind else 0.0 for name in ERRORS}
    assert found.costs() == pytest.approx(expected, abs=1e-12)
    return found


# --- sets with one kind of error -----------------------------------------------------------------


def test_perfect_detections_have_no_errors():
    found = tally(*six())
    assert not found.counts.any()
    assert found.ap50() == 1
    assert set(found.costs().values()) == {0.0}
    np.testing.assert_array_equal(found.confusion, np.diag([4, 4, 4, 0]))
    assert not any(found.examples)


def test_only_duplicates():
    def twice(i, label, x, y):
        copies = [(label, block(x, y), 0.9 - 0.05 * i), (label, block(x + 1, y), 0.89 - 0.05 * i)]
        return copies if i % 2 else None

    found = only("duplicate", 6, *six(twice))
    assert found.confusion[-1].sum() == 6


def test_only_missed():
    found = only("missed", 4, *six(lambda i, *_: [] if i % 3 == 0 else None))
    assert found.confusion[0].tolist() == [0, 0, 0, 4]  # no object of class 0 is left


def test_everything_missed():
    dataset, _ = six()
    only("missed", 12, dataset, [])


def test_only_wrong_classes():
    def rename(i, label, x, y):
        return [((label + 1) % 3, block(x, y), 0.9)] if i in (0, 4, 7) else None

    found = only("classification", 3, *six(rename))
    np.testing.assert_array_equal(
        found.confusion, [[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 4, 0], [0, 0, 0, 0]]
    )


def test_every_class_wrong():
    only("classification", 12, *six(lambda i, n, x, y: [((n + 1) % 3, block(x, y), 0.5)]))


def test_only_shifted_masks():
    def shift(i, label, x, y):
        return [(label, block(x + 9, y), 0.95)] if i in (1, 2, 8) else None

    assert 0.1 < 11 / 29 < 0.5
    found = only("localisation", 3, *six(shift))
    assert [round(e.iou, 9) for e in found.examples[1]] == [round(11 / 29, 9)] * 2


def test_only_background():
    def invent(i, label, x, y):
        stray = (label, block(x + 24, y, 10, 10), 0.91 - 0.07 * i)
        return [(label, block(x, y), 0.9 - 0.07 * i), stray] if i % 3 else None

    found = only("background", 8, *six(invent))
    assert found.confusion[-1].tolist() == [0, 4, 4, 0]


def test_both_is_a_wrong_detection_and_a_missed_object():
    def both(i, label, x, y):
        return [((label + 1) % 3, block(x + 9, y), 0.95)] if i in (0, 5) else None

    dataset, records = six(both)
    found = tally(dataset, records)
    counts = dict(zip(ERRORS, found.counts[0].tolist(), strict=True))
    assert counts == dict.fromkeys(ERRORS, 0) | {"both": 2, "missed": 2}
    costs = found.costs()
    assert costs["both"] > 0
    assert costs["missed"] > 0
    assert {name for name, cost in costs.items() if cost} == {"both", "missed"}


def test_only_thin_boundaries():
    places = [(p, label) for p in (0, 1) for label in (0, 1)]
    dataset = scene(*((p, n, block(30 + p, 20, 100, 80), False) for p, n in places))
    # Grown by 7 pixels on each side: the bands, 4 pixels wide, do not even touch.
    records = [
        detect(dataset, p, 0, block(23 + p, 13, 114, 94) if p else block(30, 20, 100, 80), 0.9)
        for p in (0, 1)
    ] + [detect(dataset, p, 1, block(23 + p, 13, 114, 94), 0.8) for p in (0, 1)]
    values = evaluate_records(records, dataset).values
    assert values["mask/AP50"] == 1
    lost = values["mask/AP50"] - values["boundary/AP50"]
    found = only("boundary", 3, dataset, records, lost)
    assert {e.iou for e in found.examples[-1]} == {0.0}
    np.testing.assert_array_equal(found.confusion, np.diag([2, 2, 0, 0]))


# --- rules ---------------------------------------------------------------------------------------


def kinds(dataset, records):
    """Names of the kinds, in the order of the records; missed objects at the end."""
    names = {-1: "found", -2: "excused", **dict(enumerate(ERRORS))}
    result, missed = {}, []
    for overlaps in compare(records, dataset, kinds=("mask", "boundary"), across=True):
        judged = judge(overlaps)
        for record, kind in zip(overlaps.records.tolist(), judged.kinds.tolist(), strict=True):
            result[record] = names[kind]
        missed += ["missed"] * int(judged.missed.sum())
    return [result[i] for i in range(len(records))] + missed


def test_first_kind_that_fits():
    dataset = scene((0, 0, block(20, 20), False), (0, 1, block(40, 20), False), pictures=1)
    records = [
        detect(dataset, 0, 0, block(20, 20), 0.9),
        # A good mask of the other object that touches the first one: its name is wrong.
        detect(dataset, 0, 0, block(37, 20, 23), 0.8),
        detect(dataset, 0, 0, block(20, 20), 0.7),
        detect(dataset, 0, 0, block(32, 20), 0.6),  # 8 of 32 pixels and 12 of 28
        detect(dataset, 0, 2, block(44, 36), 0.5),  # 16 x 4 of 736
        detect(dataset, 0, 2, block(100, 80), 0.4),
    ]
    assert kinds(dataset, records) == [
        "found", "classification", "duplicate", "localisation", "background", "background",
    ]  # fmt: skip
    assert kinds(dataset, records[:1] + records[2:]) == [
        "found", "duplicate", "localisation", "background", "background", "missed",
    ]  # fmt: skip


def test_best_score_is_mended_and_the_others_removed():
    dataset = scene((0, 0, block(20, 20), False), (1, 1, block(20, 20), False))
    # Mended, the better one finds the object; the other one would be a duplicate.
    records = [
        detect(dataset, 0, 0, block(29, 20), 0.9),
        detect(dataset, 0, 0, block(20, 29), 0.8),
        detect(dataset, 1, 1, block(20, 20), 0.7),
    ]
    found = tally(dataset, records)
    assert found.costs() == pytest.approx(dict.fromkeys(ERRORS, 0.0) | {"localisation": 0.5})
    # About an object that is found already: removed.
    records.append(detect(dataset, 1, 1, block(29, 20), 0.95))
    assert tally(dataset, records).costs()["localisation"] == pytest.approx(0.75)


def test_crowd_regions_are_no_errors():
    crowd = (0, 0, block(0, 60, 160, 60), True)
    dataset = scene((0, 0, block(20, 20), False), crowd, pictures=1)
    records = [
        detect(dataset, 0, 0, block(20, 20), 0.5),
        *(detect(dataset, 0, 0, block(10 * i, 80), 0.9) for i in range(5)),
    ]
    found = tally(dataset, records)
    assert not found.counts.any()
    assert set(found.costs().values()) == {0.0}
    assert found.confusion.sum() == 1
    # Only for its own class; elsewhere it is background, as AP counts it.
    records[1]["category_id"] = dataset.categories[1].id
    found = tally(dataset, records)
    assert dict(zip(ERRORS, found.counts[0].tolist(), strict=True))["background"] == 1
    assert found.confusion[-1].tolist() == [0, 1, 0, 0]


def test_excused_detections_are_no_errors():
    dataset = scene((0, 0, block(20, 20), False), pictures=1, classes=2)
    dataset.federated = Federated(("f", "f"), ((1,),), ((0,),))
    records = [
        detect(dataset, 0, 0, block(20, 20), 0.5),
        detect(dataset, 0, 0, block(90, 20), 0.9),  # class 0 is not labelled exhaustively here
        detect(dataset, 0, 1, block(90, 20), 0.9),
    ]
    assert kinds(dataset, records) == ["found", "excused", "background"]
    assert tally(dataset, records).confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_thresholds_decide_what_is_counted_shown_and_confused():
    def low(i, label, x, y):
        score = 0.2 if label == 1 else 0.6
        return [(label, block(x, y), score), (label, block(x + 24, y, 9, 9), score - 0.01)]

    dataset, records = six(low)
    found = tally(dataset, records, thresholds=[0.6, 0.3, 0.1])
    every, kept = (dict(zip(ERRORS, row.tolist(), strict=True)) for row in found.counts)
    assert every == dict.fromkeys(ERRORS, 0) | {"background": 12}
    assert kept == dict.fromkeys(ERRORS, 0) | {"background": 4, "missed": 4}
    np.testing.assert_array_equal(
        found.confusion, [[4, 0, 0, 0], [0, 0, 0, 4], [0, 0, 4, 0], [0, 0, 4, 0]]
    )
    for example in found.examples[ERRORS.index("background")]:
        assert records[example.record]["category_id"] == dataset.categories[2].id
    missed = found.examples[ERRORS.index("missed")]
    assert len(missed) == len({e.picture for e in missed}) == 2
    for example in missed:
        entry = dataset.annotations(example.picture)[example.object]
        assert entry["category_id"] == dataset.categories[1].id


def test_examples_are_the_best_and_bounded():
    dataset = scene(pictures=5)
    records = [detect(dataset, i % 5, 0, block(10, 10), 0.1 + 0.08 * i) for i in range(10)]
    found = tally(dataset, records, most=3)
    shown = found.examples[ERRORS.index("background")]
    assert [e.record for e in shown] == [9, 8, 7]
    assert [e.picture for e in shown] == [4, 3, 2]
    assert math.isnan(found.ap50())
    assert all(map(math.isnan, found.costs().values()))


@pytest.mark.parametrize("seed", range(6))
def test_on_random_sets(seed):
    dataset = random_set(seed)
    records = random_records(dataset, seed)
    report = evaluate_records(records, dataset)
    found = tally(dataset, records, report.thresholds)
    assert found.ap50() == pytest.approx(report.values["mask/AP50"], abs=1e-12)
    costs = found.costs()
    assert costs["boundary"] == pytest.approx(
        report.values["mask/AP50"] - report.values["boundary/AP50"], abs=1e-12
    )
    assert min(costs.values()) >= -1e-12
    assert sum(costs.values()) > 0
    # Every object is found, confused or missed, once.
    labels = [label for _, label, _, crowd in dataset.objects if not crowd]
    np.testing.assert_array_equal(found.confusion[:-1].sum(1), np.bincount(labels, minlength=3))
    # What is kept is right or one kind of error.
    kept = sum(r["score"] >= report.thresholds[_label(dataset, r)] for r in records)
    assert 0 < found.counts[1, :5].sum() <= kept
    assert found.confusion[:, :-1].sum() <= kept


def _label(dataset, record):
    return [c.id for c in dataset.categories].index(record["category_id"])


def test_nothing_at_all():
    found = ErrorTally([0.5])
    assert math.isnan(found.ap50())
    assert not found.counts.any()
