"""The official score of Cityscapes against the package's own driver."""

import builtins
import copy
import json
import math

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from brefine.data.read import read
from brefine.evaluate import evaluate_paths, evaluate_records
from brefine.metrics import cityscapes
from brefine.structures import InputError
from samples import blob, dense_rle
from test_cityscapes import write

csEval = pytest.importorskip(
    "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
    reason="needs cityscapesscripts: pip install -e '.[dev]'",
)


@pytest.fixture
def city(tmp_path):
    return read(write(tmp_path / "city", pictures=3), quiet=True)


def perturbed(dataset, seed):
    """Moved labels and stray blobs as COCO results, with equal scores and an empty mask."""
    random = np.random.default_rng(seed)
    classes = [category.id for category in dataset.categories]
    records = []
    for index, picture in enumerate(dataset.pictures):
        masks = [(np.zeros(picture.size, bool), classes[0])]
        for entry in dataset.annotations(index):
            mask = coco_mask.decode(entry["segmentation"]).astype(bool)
            for _ in range(random.integers(0, 3)):
                moved = np.roll(mask, random.integers(-1, 2, 2), (0, 1))
                masks.append((moved, entry["category_id"]))
        masks += [(blob(random, picture.size), int(random.choice(classes))) for _ in range(4)]
        records += [
            {
                "image_id": picture.id,
                "category_id": category,
                "score": round(float(random.random()), 1),
                "segmentation": dense_rle(mask),
            }
            for mask, category in masks
        ]
    return records


def reference(dataset, labels, records, folder, monkeypatch):
    """What the package's driver says about results that are written here."""
    results = []
    for index, picture in enumerate(dataset.pictures[: len(labels)]):
        lines = []
        for number, record in enumerate(records):
            if record["image_id"] == picture.id:
                name = f"{index}_{number}.png"
                Image.fromarray(coco_mask.decode(record["segmentation"]) * 9).save(folder / name)
                lines.append(f"{name} {record['category_id']} {record['score']}\n")
        results.append(folder / f"{index}.txt")
        results[-1].write_text("".join(lines))
    options = copy.copy(csEval.args)
    options.quiet, options.JSONOutput = True, False
    options.predictionPath = str(folder.resolve())
    options.gtInstancesFile = str(folder / "truth.json")
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # gone from numpy 2.4
    monkeypatch.setattr(csEval, "np", np)
    monkeypatch.setattr(csEval, "writeDict2JSON", lambda *_: None)  # fails with numpy 2's numbers
    found = csEval.evaluateImgLists([str(p) for p in results], [str(p) for p in labels], options)
    return found["averages"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("limit", [None, 2])
def test_score_is_that_of_the_official_driver(city, tmp_path, monkeypatch, limit):
    records = perturbed(city, 0)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(records))
    (report,) = evaluate_paths([file], city, official=True, limit=limit).values()
    labels = cityscapes.find_labels(city, limit)
    before = set(tmp_path.iterdir())
    (tmp_path / "theirs").mkdir()
    expected = reference(city, labels, records, tmp_path / "theirs", monkeypatch)
    assert before | {tmp_path / "theirs"} == set(tmp_path.iterdir())

    assert 0.05 < report.values["cityscapes/AP"] < 0.95
    assert report.values["cityscapes/AP"] == pytest.approx(expected["allAp"], abs=1e-9)
    assert report.values["cityscapes/AP50"] == pytest.approx(expected["allAp50%"], abs=1e-9)
    seen = set()
    for name, of_class in expected["classes"].items():
        for key, theirs in (("AP", "ap"), ("AP50", "ap50%")):
            mine = report.per_class[name][f"cityscapes/{key}"]
            assert mine == pytest.approx(float(of_class[theirs]), abs=1e-9, nan_ok=True)
            seen.add(math.isnan(mine))
    assert seen == ({True, False} if limit else {False})
    plain = evaluate_records(records, city, limit=limit).values
    assert plain == pytest.approx({key: report.values[key] for key in plain}, nan_ok=True)


def test_perfect_results_score_one(city):
    records = [
        {
            "image_id": picture.id,
            "category_id": entry["category_id"],
            "score": 0.9,
            "segmentation": entry["segmentation"],
        }
        for index, picture in enumerate(city.pictures)
        for entry in city.annotations(index)
        if not entry["iscrowd"]
    ]
    scores = cityscapes.score(records, city, cityscapes.find_labels(city))
    assert scores[""] == {"cityscapes/AP": 1, "cityscapes/AP50": 1}
    assert cityscapes.score([], city, cityscapes.find_labels(city))[""]["cityscapes/AP"] == 0


def test_what_is_missing_is_one_line(city, tmp_path, monkeypatch, toy_set):
    with pytest.raises(InputError, match=r"val.json: not Cityscapes"):
        cityscapes.find_labels(read(toy_set / "val.json"))
    labels = cityscapes.find_labels(city)
    labels[-1].unlink()
    with pytest.raises(InputError, match=f"{labels[-1].name}: no such file"):
        cityscapes.find_labels(city)
    assert cityscapes.find_labels(city, 2) == labels[:2]

    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("cityscapesscripts"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'brefine\[cityscapes\]'"):
        cityscapes.find_labels(city)
