"""Comparing: figures of drawn pictures are exact, and intervals hold what they promise."""

import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from brefine import cli
from brefine import compare as comparing
from brefine import evaluate as ev
from brefine.data.coco import CocoSet
from brefine.data.lvis import Federated
from brefine.metrics import bootstrap, mask_quality
from brefine.metrics.bootstrap import Difference, Sample, draw, interval
from brefine.metrics.overlaps import KINDS, SIZES, compare
from samples import FakePicture, FakeSet, random_records, random_set


def repeated(dataset, records, counts):
    """The set and the records with each picture there as often as it was drawn."""
    new, found = FakeSet(dataset.categories, []), []
    for i in sorted(range(len(dataset)), key=lambda i: dataset.pictures[i].id):
        for _ in range(counts[i]):
            number = len(new.pictures)
            new.pictures.append(FakePicture(number, Path(str(number)), dataset.pictures[i].size))
            new.objects += [(number, *rest) for j, *rest in dataset.objects if j == i]
            name = dataset.pictures[i].id
            found += [{**r, "image_id": number} for r in records if r["image_id"] == name]
    return new, found


def sample_of(dataset, records, kinds=KINDS):
    sample = Sample(len(dataset.categories), kinds)
    for overlaps in compare(records, dataset, kinds=kinds):
        sample.add(overlaps)
    return sample


@pytest.mark.parametrize("seed", range(6))
def test_figures_of_a_draw_are_those_of_the_repeated_pictures(seed):
    # Scores have one decimal: many are equal, also within a picture.
    dataset = random_set(seed)
    records = random_records(dataset, seed, copies=4, stray=6)
    counts = draw(len(dataset), 4, seed)
    found = sample_of(dataset, records).figures(counts)
    keys = {"AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"}
    assert set(found) == {f"{kind}/{key}" for kind in KINDS for key in keys}
    for b, column in enumerate(counts.T):
        values = ev.evaluate_records(*repeated(dataset, records, column)[::-1]).values
        for key, drawn in found.items():
            assert drawn[b] == pytest.approx(values[key], abs=1e-12, nan_ok=True), key


def test_equal_scores_within_a_picture_need_their_copies_in_turn(monkeypatch):
    """Counting every detection as often as its picture gives another AP."""

    def differences():
        worst = 0.0
        for seed in range(6):
            dataset = random_set(seed, pictures=4, objects=8, classes=1, crowds=False)
            records = random_records(dataset, seed, copies=4, stray=6)
            counts = np.full((4, 1), 3)
            found = sample_of(dataset, records, ("mask",)).figures(counts)["mask/AP"][0]
            again = ev.evaluate_records(*repeated(dataset, records, counts[:, 0])[::-1])
            worst = max(worst, abs(found - again.values["mask/AP"]))
        return worst

    assert differences() < 1e-12
    monkeypatch.setattr(
        bootstrap, "_copy_ties", lambda keys, v, most: (np.arange(len(v)), np.zeros(len(v), int))
    )
    assert differences() > 1e-6


def test_every_picture_once_is_the_evaluation_itself():
    dataset = random_set(3, classes=5)
    records = random_records(dataset, 3)
    values = ev.evaluate_records(records, dataset).values
    found = sample_of(dataset, records).figures(np.ones((len(dataset), 1), int))
    for key, drawn in found.items():
        assert drawn[0] == pytest.approx(values[key], abs=1e-12, nan_ok=True), key


def test_blocks_do_not_matter(monkeypatch):
    dataset = random_set(4)
    sample = sample_of(dataset, random_records(dataset, 4))
    counts = draw(len(dataset), 50, 1)
    whole = sample.figures(counts)
    monkeypatch.setattr(bootstrap, "BLOCK", 7 * 100)
    for key, drawn in sample.figures(counts).items():
        assert np.array_equal(drawn, whole[key], equal_nan=True)


def test_nothing_to_count():
    dataset = random_set(0)
    counts = draw(len(dataset), 3, 0)
    assert sample_of(dataset, []).figures(counts)["mask/AP"].tolist() == [0, 0, 0]
    empty = FakeSet(dataset.categories, dataset.pictures)
    records = random_records(dataset, 0)
    for found in (records, []):
        assert np.isnan(sample_of(empty, found).figures(counts)["mask/AP"]).all()
    nothing = Sample(2, KINDS)
    assert np.isnan(nothing.figures(draw(0, 3, 0))["box/AP"]).all()
    assert nothing.holding()["AP"] == 0


def test_pictures_that_hold_objects_of_a_size():
    dataset = random_set(5, pictures=9)
    for key, count in sample_of(dataset, []).holding().items():
        low, high = SIZES[key[2:]]
        areas = [(i, m.sum()) for i, _, m, crowd in dataset.objects if not crowd]
        assert count == len({i for i, area in areas if low <= area <= high}), key


def test_groups_of_classes_are_means_over_them():
    dataset = random_set(6, classes=4)
    records = random_records(dataset, 6)
    flags = np.array([True, False, True, False])
    sample = Sample(4, ("mask",), {"some": flags})
    for overlaps in compare(records, dataset, kinds=("mask",)):
        sample.add(overlaps)
    found = sample.figures(np.ones((len(dataset), 1), int))["mask/AP_some"][0]
    values = [v["mask/AP"] for v in ev.evaluate_records(records, dataset).per_class.values()]
    assert found == pytest.approx(np.nanmean(np.array(values)[flags]))


def test_federated_sets_have_their_own_figures(tmp_path):
    dataset = random_set(7, classes=3)
    negative = tuple((int(i % 3),) for i in range(len(dataset)))
    partly = tuple((int(i % 2),) for i in range(len(dataset)))
    dataset.federated = Federated(("r", "c", "c"), negative, partly)
    records = random_records(dataset, 7)
    (tmp_path / "a.json").write_text(json.dumps(records))
    found = comparing.compare([tmp_path / "a.json"] * 2, dataset, resamples=10)
    values = ev.evaluate_records(records, dataset).values
    for key in ("mask/AP", "mask/AP_S", "mask/AP_r", "mask/AP_c", "mask/AP_f", "boundary/AP"):
        value = found.figures[1][key].value
        assert value == pytest.approx(values[key], abs=1e-12, nan_ok=True), key
    assert values["mask/AP_r"] != values["mask/AP_c"]
    assert found.figures[1]["mask/AP_f"].verdict == "-"


def test_draws_are_of_as_many_pictures_and_repeatable():
    counts = draw(30, 200, 5)
    assert counts.shape == (30, 200)
    assert (counts.sum(0) == 30).all()
    assert counts.mean() == pytest.approx(1)
    assert counts.var() == pytest.approx(1, abs=0.1)  # as of a binomial of 30 and 1/30
    assert (draw(30, 200, 5) == counts).all()
    assert (draw(30, 200, 6) != counts).any()


def test_verdicts():
    def verdict(difference, low, high, pictures=50):
        return Difference(0.5, difference, low, high, pictures).verdict

    assert verdict(0.1, 0.01, 0.2) == "better"
    assert verdict(-0.1, -0.2, -0.01) == "worse"
    assert verdict(0.1, -0.01, 0.2) == verdict(0.0, 0.0, 0.0) == "within noise"
    assert verdict(0.1, 0.0, 0.2) == "within noise"
    assert verdict(0.1, 0.01, 0.2, pictures=9) == "few pictures"
    assert verdict(math.nan, math.nan, math.nan) == "-"
    a, b = np.array([0.1, math.nan, 0.3] * 100), np.array([0.0, math.nan, 0.1] * 100)
    assert interval(a, b) == pytest.approx((0.1, 0.2))
    assert all(map(math.isnan, interval(a * math.nan, b)))


def fast_sample(random, hit_rates):
    """Systems on the same pictures; detections are verdicts drawn at once, no masks."""
    pictures, objects = 40, 3
    hard = random.normal(0, 1, pictures)  # what is hard for one is hard for the other
    samples = []
    for rate in hit_rates:
        sample = Sample(1, ("mask",))
        for p in range(pictures):
            chance = 1 / (1 + np.exp(-(rate + hard[p])))
            right = random.random(2 * objects) < np.repeat([chance, 0.0], objects)
            verdicts = np.zeros((2 * objects, len(SIZES), 10), np.int8)
            verdicts[right] = bootstrap.RIGHT
            scores = np.where(right, random.beta(4, 2, len(right)), random.beta(2, 4, len(right)))
            labels = np.zeros(2 * objects, int)
            order = (-scores).argsort()
            sample._found.append((np.full(2 * objects, p), labels, scores[order]))
            sample._verdicts["mask"].append(verdicts[order])
            counts = np.ones((len(SIZES), objects), bool)
            sample._objects.append((np.full(objects, p), labels[:objects], counts))
        samples.append(sample)
    return samples


def test_intervals_cover_the_true_difference():
    """Of 60 sets drawn from one world, about 57 intervals hold the difference of that world."""
    random = np.random.default_rng(0)
    alone, paired, covered = [], [], 0
    worlds = [
        [float(s.figures(np.ones((40, 1), int))["mask/AP"][0]) for s in pair]
        for pair in (fast_sample(random, (0.0, 0.4)) for _ in range(150))
    ]
    truth = np.diff(np.mean(worlds, 0))[0]
    for seed in range(60):
        counts = draw(40, 150, seed)
        first, second = (s.figures(counts)["mask/AP"] for s in fast_sample(random, (0.0, 0.4)))
        low, high = interval(second, first)
        covered += low <= truth <= high
        paired.append(high - low)
        alone.append(np.ptp(np.percentile(second - random.permutation(first), [2.5, 97.5])))
    assert 51 <= covered < 60
    assert np.mean(paired) < np.mean(alone)  # hard pictures cancel


def test_a_thousand_draws_take_seconds():
    random = np.random.default_rng(0)
    pictures, found, objects, classes = 100, 100, 8, 20
    sample = Sample(classes, ("mask",))
    for p in range(pictures):
        labels = random.integers(0, classes, found)
        verdicts = (random.random((found, len(SIZES), 10)) < 0.08).astype(np.int8)
        sample._found.append((np.full(found, p), labels, np.sort(random.random(found))[::-1]))
        sample._verdicts["mask"].append(verdicts)
        counts = np.ones((len(SIZES), objects), bool)
        sample._objects.append((np.full(objects, p), labels[:objects], counts))
    start = time.process_time()
    sample.figures(draw(pictures, 1000, 0))
    assert time.process_time() - start < 20  # a loop over draws takes minutes


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def scored(toy_set, tmp_path):
    """The labels as results: all of them, and without every other one; both with some noise."""
    dataset = CocoSet(toy_set / "val.json")
    random = np.random.default_rng(0)
    records = [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "score": float(random.random()),
            "segmentation": entry["segmentation"],
        }
        for entry in dataset.ground_truth()["annotations"]
    ]
    paths = [tmp_path / "all.json", tmp_path / "half.json"]
    paths[0].write_text(json.dumps(records))
    paths[1].write_text(json.dumps(records[::2]))
    return toy_set / "val.json", *paths


def test_two_equal_systems_do_not_differ(scored):
    data, all_of_them, _ = scored
    found = comparing.compare([all_of_them, all_of_them], CocoSet(data), resamples=100)
    assert found.figures[1]["mask/AP"].value == 1
    for figures in found.figures:
        for key, figure in figures.items():
            if not math.isnan(figure.value):
                assert figure[1:4] == (0, 0, 0), key
                assert figure.verdict == "few pictures"  # the set has 3


def test_results_of_a_model_and_the_model(toy_set, tiny_model, tmp_path):
    dataset = CocoSet(toy_set / "val.json")
    report = ev.evaluate(comparing.open_path(tiny_model), dataset, progress=False)
    (tmp_path / "records.json").write_text(json.dumps(report.records))
    paths = [tiny_model, tmp_path / "records.json", tiny_model]
    found = comparing.compare(paths, dataset, resamples=100)
    assert found.pictures == 3
    for key, figure in found.figures[0].items():
        assert figure.value == pytest.approx(report.values[key], abs=1e-12, nan_ok=True), key
    assert "given_boxes/mask_iou" in found.figures[2]
    assert not any(key.startswith("given_boxes") for key in found.figures[1])
    assert found.figures[1]["mask/AP"] == found.figures[0]["mask/AP"]


def test_mask_quality_of_draws_is_that_of_the_repeated_objects():
    random = np.random.default_rng(0)
    objects = [[tuple(random.random(3) * 100) for _ in range(n)] for n in (3, 0, 1, 5)]
    counts = draw(4, 20, 0)
    found = comparing._resample_quality(objects, counts)
    for b, column in enumerate(counts.T):
        every = [one for one, n in zip(objects, column, strict=True) for _ in range(n)]
        values = mask_quality.summarise([one for each in every for one in each])
        for key, drawn in found.items():
            assert drawn[b] == pytest.approx(values[key], nan_ok=True)
    nothing = comparing._resample_quality([[], []], draw(2, 3, 0))
    assert np.isnan(nothing["given_boxes/mask_iou"]).all()


def test_command_prints_and_writes(scored, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--data", scored[0], "--json", tmp_path / "c.json", "--resamples", 100]
    assert cli.main(["compare", *map(str, [scored[1], scored[2], *arguments])]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "3 pictures" in out
    row = next(line for line in out.splitlines() if line.startswith("mask AP ")).split()
    value = float(row[3])
    assert row[2] == "100.0"
    assert 20 < value < 80
    assert float(row[4]) == pytest.approx(value - 100, abs=0.11)
    written = json.loads((tmp_path / "c.json").read_text())
    assert (written["pictures"], written["resamples"], written["seed"]) == (3, 100, 0)
    first, second = written["systems"]
    assert first["name"] == str(scored[1])
    assert second["figures"]["mask/AP"]["value"] == pytest.approx(value / 100, abs=1e-3)
    assert second["figures"]["mask/AP_L"]["value"] is None or second["figures"]["mask/AP_L"]
    assert second["figures"]["mask/AP"]["low"] < 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{all}", "--data", "{data}"], "two systems"),
        (["{all}", "none.json", "--data", "{data}"], "none.json: No such file"),
        (["{all}", "{half}", "--data", "none.json"], "none.json"),
        (["{all}", "{half}"], "--data"),
        (["{all}", "{half}", "--data", "{data}", "--resamples", "3"], "--resamples"),
        (["{all}", "{wrong}", "--data", "{data}"], "wrong.json: result 0"),
    ],
)
def test_mistakes_are_one_line(scored, tmp_path, capsys, arguments, part):
    (tmp_path / "wrong.json").write_text('[{"image_id": 1}]')
    names = dict(zip(("data", "all", "half"), scored, strict=True))
    given = [text.format(**names, wrong=tmp_path / "wrong.json") for text in arguments]
    assert cli.main(["compare", *given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert part in lines[-1]
    assert "Traceback" not in "".join(lines)


def test_wide_names_and_rare_classes_fit_80_columns():
    row = Difference(1.0, -1.0, -1.0, 0.0, 5000)
    figures = dict.fromkeys(comparing.FIGURES, row)
    found = comparing.Comparison(["x" * 100, "y" * 300], [figures] * 2, 5000, 1000, 123)
    console = Console(width=80, record=True, file=io.StringIO())
    comparing.print_comparison(found, console)
    text = console.export_text()
    assert "…" not in text
    assert text.count("-100.0 to +0.0  within noise") == len(figures)
