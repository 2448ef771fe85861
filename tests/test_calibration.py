"""Thresholds and probabilities: the best of all thresholds, maps that keep the ranking."""

import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import brefine
from brefine import cli, weights
from brefine import evaluate as ev
from brefine.data.coco import CocoSet
from brefine.data.toy import CATEGORIES
from brefine.metrics import calibration as cal
from brefine.metrics.calibration import Calibration
from brefine.metrics.overlaps import compare
from brefine.metrics.thresholds import BORROWED, Hits, choose, quality
from brefine.structures import InputError
from samples import random_records, random_set

# --- the map -------------------------------------------------------------------------------------


def slow_isotonic(values, weights):
    """Max-min formula: the best rising function at i is max over a <= i of min over b >= i."""
    count = len(values)
    sums = np.append(0, np.cumsum(values * weights))
    mass = np.append(0, np.cumsum(weights))

    def mean(a, b):
        return (sums[b + 1] - sums[a]) / (mass[b + 1] - mass[a])

    return [
        max(min(mean(a, b) for b in range(i, count)) for a in range(i + 1)) for i in range(count)
    ]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=25))
def test_pooling_is_isotonic_regression(pairs):
    values, weights = np.array(pairs, dtype=float).T
    starts = cal.pool(values, weights)
    fitted = np.zeros(len(values))
    for a, b in itertools.pairwise(starts):
        fitted[a:b] = np.average(values[a:b], weights=weights[a:b])
    assert fitted == pytest.approx(np.array(slow_isotonic(values, weights)))
    assert (np.diff(fitted[starts[:-1]]) > -1e-9).all()


def drawn(count, seed=0, truth=lambda s: s**2, few_levels=False):
    random = np.random.default_rng(seed)
    scores = random.beta(0.8, 1.2, count).astype(np.float32).astype(float)
    if few_levels:
        scores = np.round(scores, 1)
    return scores, random.random(count) < truth(scores)


KINDS_OF_DATA = {
    "none": drawn(0),
    "one": drawn(1),
    "few": drawn(40, 1),
    "few, all right": (drawn(30, 2)[0], np.ones(30, bool)),
    "few, all wrong": (drawn(30, 2)[0], np.zeros(30, bool)),
    "few, equal scores": (np.full(30, 0.4), np.arange(30) < 10),
    "few, upside down": (np.linspace(0, 1, 60), np.arange(60) < 30),
    "few, apart": (np.linspace(0, 1, 60), np.arange(60) >= 30),
    "ends": (np.repeat([0.0, 1.0], 200), np.arange(400) >= 150),
    "many": drawn(5000, 3),
    "many, all right": (drawn(500, 4)[0], np.ones(500, bool)),
    "many, all wrong": (drawn(500, 4)[0], np.zeros(500, bool)),
    "many, equal scores": (np.full(500, 0.4), np.arange(500) < 100),
    "many, upside down": (np.linspace(0, 1, 500), np.arange(500) < 200),
    "many, few levels": drawn(3000, 5, few_levels=True),
    "many, steps": drawn(20000, 6, lambda s: np.floor(s * 60) / 60),
}


@pytest.mark.parametrize("name", KINDS_OF_DATA)
def test_every_map_rises_strictly_and_keeps_the_ranking(name):
    scores, right = KINDS_OF_DATA[name]
    found = cal.fit(scores, right)
    assert 2 <= len(found.scores) <= 32
    assert found == Calibration.parse(json.loads(json.dumps(found.as_dict())))
    # Neighbours in single precision, where models live, and far apart; equal ones, too.
    start = np.geomspace(1e-3, 0.999, 4000).astype(np.float32)
    near = np.nextafter(start, np.float32(1))
    tried = np.unique(np.concatenate([[0, 1], start, near, scores]).astype(float))
    mapped = found(tried)
    assert (np.diff(mapped) > 0).all()
    assert mapped.min() >= 0
    assert mapped.max() <= 1
    again = found(np.concatenate([scores, scores]))
    assert (again[: len(scores)] == again[len(scores) :]).all()


def test_a_map_of_known_data_is_found():
    for count, tolerance in ((500, 0.06), (5000, 0.035), (50000, 0.01)):
        found = cal.fit(*drawn(count))
        grid = np.linspace(0.05, 0.95, 50)
        assert np.abs(found(grid) - grid**2).mean() < tolerance, count
    # Platt's form, with fewer detections than isotonic regression takes: means over many fits.
    fits = [cal.fit(*drawn(99, seed))(np.linspace(0.1, 0.9, 9)) for seed in range(50)]
    assert np.mean(fits, 0) == pytest.approx(np.linspace(0.1, 0.9, 9) ** 2, abs=0.06)


def test_which_kind_of_map_by_number_of_detections():
    step = np.arange(cal.FEWEST) >= cal.FEWEST / 2
    scores = np.linspace(0.3, 0.7, cal.FEWEST)
    many, few = cal.fit(scores, step), cal.fit(scores[1:], step[1:])
    assert many(0.3) == pytest.approx(0, abs=2e-3)  # a step; a line between two means
    assert many(0.7) == pytest.approx(1, abs=2e-3)
    assert np.ptp(np.diff(many(np.linspace(0.42, 0.58, 9)))) < 1e-9
    assert few(0.3) == pytest.approx(1 / (cal.FEWEST + 1), abs=1e-3)  # no surer than so many allow
    assert few(0.5) == pytest.approx(0.5, abs=0.05)


def test_no_step_of_a_map_rests_on_few_detections():
    scores = np.linspace(0.01, 0.99, 400)
    right = np.arange(400) >= 200
    right[-1] = False  # one wrong at the top, three right at the bottom
    right[:3] = True
    found = cal.fit(scores, right)
    assert 0.98 < found(0.99) < 1  # 199 of 200
    assert found(0.01) < 0.05
    alone = cal.fit(scores, np.arange(400) >= 397)  # three right of the best ten are 0.3
    assert alone(1.0) == pytest.approx(0.3, abs=0.01)


def test_what_tells_nothing_becomes_the_share_of_right_ones():
    for count in (60, 600):
        scores = np.linspace(0, 1, count)
        found = cal.fit(scores, np.arange(count) < count / 3)  # the best scores are wrong
        assert found(np.array([0.0, 0.5, 1.0])) == pytest.approx([1 / 3] * 3, abs=0.02)
    assert cal.fit(np.full(30, 0.9), np.ones(30, bool))(0.9) == pytest.approx(31 / 32, abs=0.01)
    assert cal.fit(np.full(30, 0.9), np.zeros(30, bool))(0.9) == pytest.approx(1 / 32, abs=0.01)


def test_scores_that_are_no_fractions_are_left_alone():
    scores, right = np.array([-1.0, 0.5, 7.0] * 50), np.array([False, True, True] * 50)
    assert cal.fit(scores, right) == Calibration()
    assert math.isnan(cal.calibration_error(scores, right))
    identity = Calibration()
    values = np.random.default_rng(0).random(1000).astype(np.float32)
    assert (identity(values) == values.astype(float)).all()


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {"scores": [0, 1]},
        {"scores": [0, 1], "probabilities": [0, 1], "more": 1},
        {"scores": [0], "probabilities": [0]},
        {"scores": [0, 1], "probabilities": [0, 0.5, 1]},
        {"scores": [0, 1], "probabilities": [0.5, 0.5]},
        {"scores": [0, 1], "probabilities": [0.5, 0.4]},
        {"scores": [0, 0.5, 0.5, 1], "probabilities": [0, 0.1, 0.2, 1]},
        {"scores": [0, 1], "probabilities": [0, 1.5]},
        {"scores": [0, 1], "probabilities": [0, math.nan]},
        {"scores": [0.1, 1], "probabilities": [0, 1]},
        {"scores": [0, 2], "probabilities": [0, 1]},
        {"scores": ["a", 1], "probabilities": [0, 1]},
    ],
    ids=repr,
)
def test_what_is_no_map_is_refused(wrong):
    with pytest.raises(ValueError, match=r".+"):
        Calibration.parse(wrong)


# --- the error -----------------------------------------------------------------------------------


def test_scores_that_no_map_fits_have_no_error():
    scores, right = np.array([5.0, 0.5]), np.array([True, False])
    hits = Hits(np.arange(2), np.zeros(2, int), scores, right, np.zeros(1, int))
    assert math.isnan(cal.calibration_error(cal.cross_fitted(hits), right))


def test_calibration_error_by_hand():
    # Bins are 1/15 wide. 0.9 twice, right once: 2 x 0.4; 0.5 right: 0.5; of 4 with a perfect 0.
    scores, right = np.array([0.9, 0.9, 0.5, 0.0]), np.array([True, False, True, False])
    assert cal.calibration_error(scores, right) == pytest.approx((0.8 + 0.5) / 4)
    assert cal.calibration_error(np.ones(3), np.ones(3, bool)) == 0
    assert math.isnan(cal.calibration_error(np.zeros(0), np.zeros(0, bool)))


def test_cross_fitting_never_sees_its_own_pictures():
    scores, right = drawn(3000, 7)
    pictures = np.random.default_rng(1).integers(0, 40, 3000)
    hits = Hits(pictures, np.zeros(3000, int), scores, right, np.zeros(10, int))
    mapped = cal.cross_fitted(hits)
    odd = pictures % 2 == 1
    flipped = right ^ odd  # other verdicts in odd pictures: only even ones get another map
    again = cal.cross_fitted(hits._replace(right=flipped))
    assert (again[odd] == mapped[odd]).all()
    assert np.abs(again[~odd] - mapped[~odd]).max() > 0.1
    # Honest, and better than scores that run high.
    before, after = (cal.calibration_error(s, right) for s in (scores, mapped))
    assert after < 0.04 < 0.1 < before


# --- thresholds ----------------------------------------------------------------------------------


def counted(hits, label, score):
    """(right, kept, objects) of one class at a threshold, or of all for None."""
    mine = np.ones(len(hits.scores), bool) if label is None else hits.labels == label
    kept = mine & (hits.scores >= score)
    objects = len(hits.true_labels) if label is None else (hits.true_labels == label).sum()
    return np.array([hits.right[kept].sum(), kept.sum(), objects], dtype=float)


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_against_trying_all(seed):
    random = np.random.default_rng(seed)
    count, classes = int(random.integers(1, 150)), 4
    labels = random.integers(0, 3, count)  # nothing is found of class 3
    scores = np.round(random.random(count), int(random.integers(1, 4)))
    right = random.random(count) < scores
    true = np.concatenate([labels[right], random.integers(0, classes - seed % 2, 12)])
    hits = Hits(np.zeros(count, int), labels, scores, right, true)
    found, overall = choose(hits, classes)

    def f1(parts):
        return 2 * parts[0] / (parts[1] + parts[2])

    best = max(f1(counted(hits, None, s)) for s in scores)
    assert f1(counted(hits, None, overall)) == pytest.approx(best)
    share = BORROWED / len(true)
    for label in range(classes):

        def borrowed(score, label=label):
            return f1(counted(hits, label, score) + share * counted(hits, None, score))

        best = max(map(borrowed, scores))
        assert borrowed(found[label]) == pytest.approx(best)
        higher = [s for s in scores if s > found[label]]
        assert all(borrowed(s) < best - 1e-13 for s in higher)
        if label not in true:
            assert found[label] == overall


def test_few_objects_borrow_and_many_decide_for_themselves():
    random = np.random.default_rng(0)
    # Class 0: right above 0.7. Class 1: right above 0.3, with 1 object or with 400.
    for count in (1, 400):
        scores = np.concatenate([random.random(2000), random.random(count * 2)])
        labels = np.repeat([0, 1], [2000, count * 2])
        right = scores > np.where(labels == 0, 0.7, 0.3)
        true = labels[right]
        hits = Hits(np.zeros(len(labels), int), labels, scores, right, true)
        found, overall = choose(hits, 2)
        assert found[0] == pytest.approx(0.7, abs=0.01)
        assert found[1] == pytest.approx(0.3 if count == 400 else 0.7, abs=0.05)
        assert overall == (found[0] if count == 1 else pytest.approx(0.7, abs=0.3))


def test_one_class_alone_has_its_own_best_and_nothing_right_has_a_half():
    hits = Hits(
        np.zeros(4, int),
        np.zeros(4, int),
        np.array([0.9, 0.8, 0.7, 0.6]),
        np.array([True, False, True, False]),
        np.zeros(2, int),
    )
    assert choose(hits, 1) == ([0.7], 0.7)
    assert choose(hits, 3) == ([0.7] * 3, 0.7)
    assert choose(hits._replace(right=np.zeros(4, bool)), 2) == ([0.5, 0.5], 0.5)
    nothing = Hits.join([])
    assert choose(nothing, 2) == ([0.5, 0.5], 0.5)
    values = quality(hits.scores, hits.right, 2, 0.7)
    assert values == pytest.approx({"F1": 4 / 5, "precision": 2 / 3, "recall": 1.0})
    nothing = quality(hits.scores, hits.right, 2, 0.95)
    assert (nothing["F1"], nothing["recall"]) == (0.0, 0.0)
    assert math.isnan(nothing["precision"])
    assert all(map(math.isnan, quality(hits.scores, hits.right, 0, 0.5).values()))


@pytest.mark.parametrize("seed", range(3))
def test_hits_are_what_ap_at_half_counts(seed):
    dataset = random_set(seed)
    records = random_records(dataset, seed)
    hits = Hits.join(Hits.of(o) for o in compare(records, dataset, kinds=("mask",)))
    objects = [label for _, label, _, crowd in dataset.objects if not crowd]
    assert sorted(hits.true_labels.tolist()) == sorted(objects)
    # Recall at IoU 0.5 with all detections is the share of objects found.
    per_class = ev.evaluate_records(records, dataset, boundary=False).per_class
    for label, values in enumerate(per_class.values()):
        mine = hits.labels == label
        ap = values["mask/AP50"]
        if math.isnan(ap):
            continue
        order = np.lexsort((np.arange(mine.sum()), -hits.scores[mine]))
        right = hits.right[mine][order].cumsum()
        precision = right / (np.arange(len(right)) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        recall = right / (hits.true_labels == label).sum()
        steps = np.searchsorted(recall, np.linspace(0, 1, 101))
        assert ap == pytest.approx(np.append(precision, 0)[steps].mean())


# --- stored with a model -------------------------------------------------------------------------

STEEP = Calibration((0.0, 0.3, 0.31, 0.9, 1.0), (0.0, 0.001, 0.7, 0.701, 0.99))


@pytest.mark.parametrize("seed", range(3))
def test_ap_is_that_of_the_scores_before(seed):
    dataset = random_set(seed)
    records = random_records(dataset, seed)
    before = ev.evaluate_records(records, dataset)
    for mapping in (STEEP, before.calibration):
        mapped = [{**r, "score": float(mapping(r["score"]))} for r in records]
        after = ev.evaluate_records(mapped, dataset)
        for key, value in before.values.items():
            if not key.startswith("calibration"):
                assert after.values[key] == pytest.approx(value, abs=1e-12, nan_ok=True), key
        # Thresholds move with the scores and keep the same detections.
        for label in range(len(dataset.categories)):
            kept = [r["score"] >= before.thresholds[label] for r in records]
            assert kept == [r["score"] >= after.thresholds[label] for r in mapped]
    assert before.values["calibration/error"] > 0.1
    assert cal.calibration_error(
        *(np.array(column) for column in zip(*hit_pairs(mapped, dataset), strict=True))
    ) == pytest.approx(after.values["calibration/error"])


def hit_pairs(records, dataset):
    hits = Hits.join(Hits.of(o) for o in compare(records, dataset, kinds=("mask",)))
    return zip(hits.scores, hits.right, strict=True)


def test_no_objects_no_figures():
    dataset = random_set(0)
    records = random_records(dataset, 0)
    dataset.objects.clear()
    report = ev.evaluate_records(records, dataset)
    for key in (
        "threshold/F1",
        "threshold/precision",
        "calibration/error",
        "calibration/error_mapped",
    ):
        assert math.isnan(report.values[key])


def test_reports_come_back_whole(tmp_path):
    dataset = random_set(1)
    report = ev.evaluate_records(random_records(dataset, 1), dataset)
    report.save(tmp_path)
    again = ev.Report.load(tmp_path)
    assert again.calibration == report.calibration != cal.IDENTITY
    assert (again.overall, again.thresholds) == (report.overall, report.thresholds)
    assert again.per_class["class 0"]["threshold/F1"] == report.per_class["class 0"]["threshold/F1"]


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def give(folder, calibration=STEEP, thresholds=(0.1, 0.2, 0.3, 0.4)):
    weights.store(
        folder,
        thresholds=thresholds,
        overall=0.25,
        calibration=calibration,
        scores={"mask/AP": 0.4321},
    )


def test_what_is_stored_comes_back_and_tensors_stay(model):
    before = weights.load(model)
    assert (before.calibration, before.overall) == (cal.IDENTITY, 0.5)
    give(model, thresholds=(0.9, 0.8, 0.7, 0.6))
    after = weights.load(model)
    assert after.thresholds == [0.9, 0.8, 0.7, 0.6]
    assert (after.calibration, after.overall) == (STEEP, 0.25)
    assert (after.recipe, after.categories) == (before.recipe, before.categories)
    old, new = before.segmenter.state_dict(), after.segmenter.state_dict()
    assert all(torch.equal(value, new[key]) for key, value in old.items())
    card = (model / "README.md").read_text()
    assert "| 1 | 7 | cloud | 0.800 |" in card
    assert "one threshold for all | 0.250" in card
    assert "| mask/AP | 0.4321 |" in card
    assert sorted(path.name for path in model.iterdir()) == sorted(weights.FILES)


def rewrite(folder, change):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    change(header)
    save_file(state, path, header)


def test_older_models_load_as_before(model):
    def forget(header):
        del header["calibration"], header["overall"]

    rewrite(model, forget)
    loaded = weights.load(model)
    assert (loaded.calibration, loaded.overall) == (cal.IDENTITY, 0.5)
    assert loaded.thresholds == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("calibration", "{", "calibration is damaged"),
        ("calibration", "[1, 2]", "calibration is damaged"),
        ("calibration", '{"scores": [0, 1], "probabilities": [1, 0]}', "calibration is damaged"),
        ("calibration", '{"scores": [0, 1], "probabilities": [0, NaN]}', "calibration is damaged"),
        ("overall", "NaN", "finite threshold"),
        ("overall", "[]", "thresholds are damaged"),
    ],
)
def test_damaged_headers_are_one_line(model, key, value, part):
    rewrite(model, lambda header: header.update({key: value}))
    with pytest.raises(InputError, match=part) as caught:
        weights.load(model)
    assert "\n" not in str(caught.value)


def test_predictors_give_probabilities_in_the_same_order(model):
    picture = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
    raw = brefine.load(model, device="cpu")(picture, threshold=0)
    assert len(raw) > 3
    spread = np.quantile(raw.scores.numpy(), [0.3, 0.6])
    found = Calibration((0.0, *spread.tolist(), 1.0), (0.0, 0.4, 0.41, 0.9))
    limits = found(spread.mean())
    give(model, found, [float(limits)] * len(CATEGORIES))
    predictor = brefine.load(model, device="cpu")
    mapped = predictor(picture, threshold=0)
    assert torch.equal(mapped.boxes, raw.boxes)
    assert mapped.scores.tolist() == found(raw.scores.numpy()).tolist()
    assert len(set(mapped.scores.tolist())) == len(set(raw.scores.tolist()))
    # The stored thresholds are probabilities, and so are those that are given.
    kept = predictor(picture)
    assert 0 < len(kept) < len(raw)
    assert torch.equal(kept.boxes, raw[raw.scores >= spread.mean()].boxes)
    assert len(predictor(picture, threshold=0.4)) == (mapped.scores >= 0.4).sum()
    assert predictor.records(picture, 1, threshold=0)[0]["score"] == mapped.scores[0].item()


def test_storing_learns_from_raw_scores_again_and_again(model, toy_set, capsys):
    data = toy_set / "val.json"
    plain = ev.evaluate(brefine.load(model, device="cpu"), CocoSet(data), progress=False)
    arguments = ["evaluate", str(model), "--data", str(data), "--boxes", "detected"]
    headers = []
    for _ in range(2):
        assert cli.main([*arguments, "--store"]) == 0
        out = capsys.readouterr().out
        assert "one threshold for all" in out
        assert "calibration error" in out
        stored = weights.load(model)
        headers.append((stored.calibration, stored.thresholds, stored.overall))
    assert headers[0] == headers[1]  # the first map is not taken for scores by the second
    assert headers[0][0] == plain.calibration != cal.IDENTITY
    assert headers[0][1] == plain.calibration(plain.thresholds).tolist()
    again = ev.evaluate(brefine.load(model, device="cpu"), CocoSet(data), progress=False)
    for key, value in plain.values.items():
        if "AP" in key or "AR" in key or "given" in key:
            assert again.values[key] == pytest.approx(value, abs=1e-12, nan_ok=True)
    assert again.records[0]["score"] == plain.calibration(plain.records[0]["score"])


def test_what_cannot_be_stored_is_one_line(model, toy_set, tmp_path, capsys, monkeypatch):
    (tmp_path / "records.json").write_text("[]")
    data = ["--data", str(toy_set / "val.json"), "--store"]
    for arguments in (
        ["evaluate", str(tmp_path / "records.json"), *data],
        ["evaluate", str(model), *data, "--boxes", "ground-truth"],
    ):
        assert cli.main(arguments) == 2
        assert "which thresholds to store" in capsys.readouterr().err.splitlines()[-1]
    with monkeypatch.context() as patch:  # before hours of evaluation
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        assert cli.main(["evaluate", str(model), *data]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"{model}: cannot write there: copy the folder and name the copy")
    assert weights.load(model).calibration == cal.IDENTITY


def test_one_threshold_for_all_on_request(model, toy_set, tmp_path, capsys):
    predictor = brefine.load(model, device="cpu")
    scores = [
        r["score"] for r in predictor.records(toy_set / "images/val_00000.png", 1, threshold=0)
    ]
    middle = float(np.median(scores))
    weights.store(model, thresholds=[1.0] * 4, overall=middle, calibration=cal.IDENTITY, scores={})
    found = []
    for extra in ([], ["--threshold", "overall"], ["--threshold", str(middle)]):
        arguments = [model, toy_set / "images/val_00000.png", "--out", tmp_path / "out", *extra]
        assert cli.main(["predict", *map(str, arguments)]) == 0
        found.append(json.loads((tmp_path / "out/predictions.json").read_text()))
    assert found[0] == []
    assert found[1] == found[2]
    assert len(found[1]) == sum(score >= np.float32(middle) for score in scores) > 0
    for wrong in ("all", "1.1", "nan"):
        assert cli.main(["predict", str(model), "x.png", "--threshold", wrong]) == 2
        assert "--threshold" in capsys.readouterr().err.splitlines()[-1]
