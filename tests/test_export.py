"""Exported files: what they find is what the model finds; they need no torch; bad ones are told."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import openvino
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

import brefine
from brefine import exported, weights
from brefine.cli import main
from brefine.compare import compare
from brefine.data.coco import CocoSet
from brefine.data.toy import CATEGORIES
from brefine.evaluate import evaluate_paths
from brefine.export import (
    Graph,
    Parity,
    _alike,
    _compare,
    check,
    export,
    save_ir,
    simplify,
    suppress,
)
from brefine.exported import Session
from brefine.formats import FORMATS
from brefine.int8 import export_int8
from brefine.jobs import PLACES
from brefine.methods import create
from brefine.metrics.calibration import Calibration
from brefine.parts.masks import bound
from brefine.parts.two_stage import Detector
from brefine.predict import Predictor
from brefine.recipe import Recipe
from brefine.rle import Runs
from brefine.runs import of_window
from brefine.structures import Images, InputError, Instances
from brefine.views import combine

OPTIONS: dict[str, Any] = {
    "backbone": "test_resnet",
    "channels": 16,
    "detector": {
        "box_hidden": 32,
        "detections": 10,
        "candidates": [200, 100],
        "proposals": [100, 50],
        "norm": "batch",
        "frozen_stages": 0,
    },
}
SMALL: dict[str, dict[str, Any]] = {
    "brefine": {
        "stages": 2,
        "num_convs": 1,
        "dilations": [1, 2],
        "detector": {**OPTIONS["detector"], "rpn_delta_weights": [2, 2, 1, 1]},
    },
    "margined": {"detector": {**OPTIONS["detector"], "mask_margin": 0.1}},
}
CALIBRATION = Calibration((0.0, 0.3, 1.0), (0.0, 0.6, 1.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders whose scores and masks differ: the last layers have large weights."""
    made = {}
    for name, small in SMALL.items():
        method = "brefine" if name == "brefine" else "mask_rcnn"
        torch.manual_seed(1)
        recipe = Recipe.parse(
            {
                "model": {"method": method, "options": {**OPTIONS, **small}},
                "data": {"short_side": 96, "long_side": 128},
                "train": {"steps": 1, "lr": 0.001},
            },
            "tiny",
        )
        model: Any = create(method, len(CATEGORIES), **recipe.model.options)
        for layer, scale in (
            (model.rpn.objectness, 20),
            (model.rpn.deltas, 3),
            (model.box_head.classes, 30),
            (model.box_head.deltas, 100),
            (model.mask_head.logits, 30),
        ):
            layer.weight.data *= scale
        made[name] = tmp_path_factory.mktemp("models") / name
        weights.save(
            made[name],
            model,
            recipe,
            CATEGORIES,
            thresholds=[0.1, 0.2, 0.3, 0.4],
            overall=0.25,
            calibration=CALIBRATION,
        )
    return made


Made = tuple[Path, Path, Parity]


@pytest.fixture(scope="module")
def exports(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Made]:
    """Of a method the model folder, its ONNX file, and what the check said.

    OpenVINO's files beside them are made of these, since exporting takes long.
    """

    @cache
    def make(method: str) -> Made:
        file = tmp_path_factory.mktemp("onnx") / "made" / "model.onnx"
        parity = export(folders[method], file)
        assert list(file.parent.iterdir()) == [file]
        model = openvino.convert_model(file)
        metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
        save_ir(model, file.with_suffix(".xml"), metadata)
        return folders[method], file, parity

    return make


@pytest.fixture
def onnx_file(exports: Callable[[str], Made]) -> Made:
    """One of them; ``test_export_methods`` exports every method."""
    return exports("brefine")


@pytest.fixture(params=["brefine.onnx", "brefine.xml", "margined.onnx", "margined.xml"])
def pair(request: pytest.FixtureRequest, exports: Callable[[str], Made]) -> tuple[Path, Path]:
    """A model folder and an exported file; one model with ``mask_margin``."""
    name, suffix = request.param.split(".")
    folder, file, _ = exports(name)
    return folder, file.with_suffix(f".{suffix}")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def iou(one: Any, other: Any) -> float:
    rles = [{**each, "counts": each["counts"].encode()} for each in (one, other)]
    return float(coco_mask.iou(rles[:1], rles[1:], [0])[0, 0])


def test_export_checks_and_keeps(onnx_file: Made) -> None:
    folder, file, parity = onnx_file
    assert parity.good
    assert parity.objects > 100
    assert parity.box < 0.01
    assert parity.iou > 0.999
    model = onnx.load(file)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [(each.domain, each.version) for each in model.opset_import if not each.domain] == [
        ("", 18)
    ]
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["short_side"]) == 96
    assert said["version"] == brefine.__version__
    assert said["method"] == folder.name


def test_finds_what_the_model_finds_in_batches_of_any_size(pair: tuple[Path, Path]) -> None:
    folder, file = pair
    model: Any = weights.load(folder).segmenter
    session = Session(file, threads=1)
    for size, count in (((64, 96), 1), ((96, 128), 3), ((128, 64), 2)):
        pictures = [torch.from_numpy(noise(*size, seed)).permute(2, 0, 1) for seed in range(count)]
        pictures[-1] = pictures[-1][:, :-9, :-5]  # padded, where it is not alone
        images = Images.stack(pictures)
        with torch.inference_mode():
            expected = model.predict(images)
        boxes, labels, scores, of, logits, *spans = session(
            images.pixels.numpy(), images.sizes.numpy(), session.least
        )
        assert len(boxes) == sum(map(len, expected)) > 0
        assert len(spans) == (folder.name == "margined")
        for i, one in enumerate(expected):
            here = boxes[of == i]
            if spans:  # where rounding decides on a cell, the box around the mask jumps
                assert one.spans is not None
                np.testing.assert_allclose(spans[0][of == i], one.spans.numpy(), atol=0.01)
                read = [torch.from_numpy(part[of == i]) for part in (boxes, logits, spans[0])]
                np.testing.assert_allclose(here, bound(*read, images.sizes[i]), atol=1e-3)
                assert (np.abs(here - one.boxes.numpy()) < 0.01).mean() > 0.9
            else:
                np.testing.assert_allclose(here, one.boxes.numpy(), atol=0.01)
            assert labels[of == i].tolist() == one.labels.tolist()
            np.testing.assert_allclose(scores[of == i], one.scores.numpy(), atol=1e-5)
            np.testing.assert_allclose(logits[of == i], one.logits.numpy(), atol=1e-3)
        best = float(scores.max())
        one = session(
            images.pixels.numpy(),
            images.sizes.numpy(),
            np.nextafter(np.float32(best), np.float32(-1)),
        )
        assert len(one[0]) == 1
        assert float(one[2][0]) == best
        none = session(images.pixels.numpy(), images.sizes.numpy(), 1.0)
        assert [each.shape[0] for each in none] == [0] * (5 + len(spans))


def test_is_a_model_like_any_other(pair: tuple[Path, Path]) -> None:
    folder, file = pair
    plain, opened = brefine.load(folder, device="cpu"), brefine.load(file, device="cpu")
    assert isinstance(opened, Predictor)
    for name in ("categories", "short_side", "long_side", "thresholds", "overall", "calibration"):
        assert getattr(opened, name) == getattr(plain, name), name
    assert opened.calibration == CALIBRATION
    for size in ((150, 200), (96, 70)):
        expected, found = (p.records(noise(*size), 5) for p in (plain, opened))
        assert len(expected) == len(found) > 0
        for one, other in zip(expected, found, strict=True):
            assert one["category_id"] == other["category_id"]
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)
            assert one["bbox"] == pytest.approx(other["bbox"], abs=0.02)
            assert iou(one["segmentation"], other["segmentation"]) > 0.99
    with pytest.raises(InputError, match="exported model cannot be asked about given boxes"):
        opened.given(noise(90, 90), plain(noise(90, 90)).instances)
    margin = Predictor(opened.model, opened.categories, margin=0.1, device="cpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="exported model cannot be asked for a margin"):
        margin(noise(90, 90))


def test_is_evaluated_like_any_other(exports: Callable[[str], Made], toy_set: Path) -> None:
    folder, file, _ = exports("brefine")
    dataset = CocoSet(toy_set / "val.json")
    reports = evaluate_paths([folder, file], dataset, given_boxes=False, limit=2)
    one, other = (each.values for each in reports.values())
    assert one.keys() == other.keys()
    assert one["mask/AR100"] > 0
    for key, value in one.items():
        assert other[key] == pytest.approx(value, abs=1e-3, nan_ok=True), key
    with pytest.raises(InputError, match="evaluate without --boxes detected"):
        evaluate_paths([file], dataset, limit=2)
    comparison = compare([folder, file], dataset, resamples=10, limit=2)
    one, other = (set(figures) for figures in comparison.figures)
    assert "mask/AP" in other
    assert one == other


WITHOUT_TORCH = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "lightning", "safetensors"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Nothing())
from brefine.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


def without_torch(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """The command ``brefine`` where there is no torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def same(one: Any, other: Any, box: float = 0.02, score: float = 1e-5, mask: float = 0.99) -> bool:
    return bool(
        one["category_id"] == other["category_id"]
        and np.abs(np.subtract(one["bbox"], other["bbox"])).max() < box
        and abs(one["score"] - other["score"]) < score
        and iou(one["segmentation"], other["segmentation"]) > mask
    )


def test_needs_no_torch(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = pair
    pictures, out = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    Image.fromarray(noise(96, 128)).save(pictures / "as_is.png")
    Image.fromarray(noise(150, 210)).save(pictures / "resized.png")
    ran = without_torch("predict", file, pictures, "--out", out, "--save", ",".join(FORMATS))
    assert ran.returncode == 0, ran.stderr
    made = {path.name for path in out.iterdir()}
    assert made == {*PLACES.values(), "settings.json"}
    records = json.loads((out / "predictions.json").read_text())
    predictor = brefine.load(folder, device="cpu")
    for name in ("as_is.png", "resized.png"):
        found = [record for record in records if record["image_id"] == name]
        expected = predictor.records(pictures / name, name)
        assert len(expected) > 0
        if name == "as_is.png":
            assert len(found) == len(expected)
            assert all(map(same, expected, found))
        else:
            # Resized by Pillow, pixels differ by one grey value at most: hardly any object moves.
            near = [any(same(one, each, 2, 0.02, 0.9) for each in found) for one in expected]
            assert np.mean(near) >= 0.8


DROPPED = """
import gc, os, signal, sys, threading
from brefine.exported import Session
one, other = (Session(sys.argv[1]) for _ in range(2))
del one
gc.collect()
del other
gc.collect()
box = [Session(sys.argv[1])]
thread = threading.Thread(target=box.clear)
thread.start()
thread.join()
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_model_that_is_dropped_leaves_signals_alone(pair: tuple[Path, Path]) -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", DROPPED, str(pair[1])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "heard\n"), ran.stderr


def test_what_needs_torch_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    ran = without_torch("predict", folders["brefine"], tmp_path, "--out", tmp_path / "out")
    assert ran.returncode == 2
    assert ran.stderr == (
        "error: torch is not installed: without it only exported files can predict\n"
    )


def test_batches_and_tiles_are_those_of_the_predictor(pair: tuple[Path, Path]) -> None:
    folder, file = pair
    plain, opened = brefine.load(folder, device="cpu"), exported.load(file, threads=1)
    pictures = [noise(96, 128, 1), noise(96, 96, 2), noise(96, 128, 3)]
    together = opened.records_of(pictures, [5, 6, 7])
    assert [{one["image_id"] for one in records} for records in together] == [{5}, {6}, {7}]
    for picture, id, found in zip(pictures, (5, 6, 7), together, strict=True):
        alone = opened(picture, id)
        assert len(alone) == len(found)
        assert all(map(same, alone, found))
    large = noise(96, 224)
    expected = plain.records(large, 1, tile=96, overlap=32)
    found = opened(large, 1, tile=96, overlap=32)
    assert len(expected) == len(found) > 0
    assert all(map(same, expected, found))
    with pytest.raises(InputError, match="--tta does: use the model folder"):
        opened.records(large, 1, views=combine(flip=True))


def test_takes_any_picture(pair: tuple[Path, Path]) -> None:
    model = exported.load(pair[1], threads=1)
    array = noise(70, 90)
    first = model(array)
    assert first
    assert first[0]["image_id"] == "picture"
    assert model(Image.fromarray(array)) == first
    assert model(array[::-1][::-1]) == first
    assert len(model(array, threshold=0.0)) >= len(first)
    assert model(array, threshold=1.0) == []
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    assert model(content.getvalue()) == first
    for strange in (array[:, :, :2], array.astype(float), None):
        with pytest.raises(InputError, match="picture: expected"):
            model(strange)  # type: ignore[arg-type]


def test_check_refuses_another_model(exports: Callable[[str], Made]) -> None:
    folder, file, _ = exports("brefine")
    model: Any = weights.load(folder).segmenter
    session = Session(file, threads=1)
    assert check(model, session, 96).good
    assert model.box_head.score_threshold == 0.05
    kept = model.mask_head.logits.bias.data.clone()
    # A tenth of the spread of the logits shifts outlines, and nothing else.
    model.mask_head.logits.bias.data += 0.1
    masks = check(model, session, 96)
    assert not masks.good
    assert masks.box < 0.01
    model.mask_head.logits.bias.data = kept
    model.box_head.deltas.bias.data += 0.01
    assert not check(model, session, 96).good


def answers(model: Any, change: Callable[[Instances], Instances] = lambda found: found) -> Any:
    """A session that finds what a model finds, picture by picture changed."""

    def session(pixels: np.ndarray, sizes: np.ndarray, least: float) -> list[np.ndarray]:
        usual, model.box_head.score_threshold = model.box_head.score_threshold, least
        found = model.predict(Images(torch.from_numpy(pixels), torch.from_numpy(sizes)))
        model.box_head.score_threshold = usual
        found = [change(one) if len(one) else one for one in found]
        fields = [
            (one.boxes, one.labels, one.scores, one.logits)
            + (() if one.spans is None else (one.spans,))
            for one in found
        ]
        boxes, labels, scores, *rest = map(torch.cat, zip(*fields, strict=True))
        of = torch.arange(len(found)).repeat_interleave(torch.tensor(list(map(len, found))))
        return [each.numpy() for each in (boxes, labels, scores, of, *rest)]

    return session


def only_last(moved: float = 0.0) -> Callable[[Instances], Instances]:
    """The last object of a picture is moved, or dropped if it is moved by nothing."""

    def change(found: Instances) -> Instances:
        if not moved:
            return found[torch.arange(len(found) - 1)]
        boxes = found.boxes.clone()
        boxes[-1] += moved
        return replace(found, boxes=boxes)

    return change


WRONG: dict[str, dict[str, Callable[[Instances], Instances]]] = {
    "brefine": {
        "one is lost": lambda found: found[torch.arange(0)] if len(found) == 1 else found,
        "one is moved": lambda found: (
            replace(found, boxes=found.boxes + 50) if len(found) == 1 else found
        ),
        "last is lost": only_last(),
        "last is moved": only_last(40.0),
        "scores": lambda found: replace(found, scores=found.scores / 2),
        "labels": lambda found: replace(found, labels=(found.labels + 1) % 4),
    },
    "margined": {
        "boxes": lambda found: replace(found, boxes=found.boxes + 0.1),
        "boxes are RoIs": lambda found: replace(found, boxes=found.spans),
        "RoIs": lambda found: replace(found, spans=found.spans + 0.1),
        "masks": lambda found: replace(found, logits=-found.logits),
    },
}


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name, all_of in WRONG.items() for what in all_of]
)
def test_check_sees_what_is_wrong(folders: dict[str, Path], name: str, what: str) -> None:
    model: Any = weights.load(folders[name]).segmenter
    assert check(model, answers(model), 64).good
    assert not check(model, answers(model, WRONG[name][what]), 64).good


@pytest.mark.parametrize(("others", "good"), [(1, True), (2, False)])
def test_check_allows_one_turned_decision_in_a_hundred_objects(others: int, good: bool) -> None:
    boxes = torch.arange(100.0)[:, None] * 10 + torch.tensor([0.0, 0, 8, 8])
    expected = Instances((1000, 1000), boxes, torch.zeros(100).long(), torch.full((100,), 0.5))
    expected = replace(expected, logits=torch.ones(100, 4, 4))
    moved = boxes.clone()
    moved[:others] += torch.tensor([100.0, 0, 100, 0])
    parity = Parity()
    _compare([expected], [replace(expected, boxes=moved)], parity, 300)
    assert parity.unmatched == 2 * others
    assert parity.good == good


def test_check_compares_objects_of_which_the_model_is_sure(folders: dict[str, Path]) -> None:
    model: Any = weights.load(folders["brefine"]).segmenter
    model.box_head.classes.bias.data += 1000  # whatever the box: a score of 1
    counts = []
    answer = answers(model)

    def session(pixels: np.ndarray, sizes: np.ndarray, least: float) -> list[np.ndarray]:
        found: list[np.ndarray] = answer(pixels, sizes, least)
        counts.append(len(found[0]))
        return found

    assert check(model, cast(Any, session), 64).good
    asked = np.array(counts).reshape(6, 3)  # many objects, one, none
    assert (asked[:, :2] > 0).all()
    assert (asked[:, 2] == 0).all()


class Program:
    """A file exported earlier, as torch.onnx hands one over."""

    def __init__(self, file: Path) -> None:
        self.file, self.model = file, SimpleNamespace(metadata_props={})

    def save(self, path: Path, external_data: bool) -> None:
        shutil.copy(self.file, path)


def test_a_file_that_fails_is_not_kept(
    exports: Callable[[str], Made],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, file, _ = exports("brefine")
    other: Any = weights.load(folder)
    other.segmenter.box_head.deltas.bias.data += 0.1
    monkeypatch.setattr("brefine.export.weights.load", lambda _: other)
    monkeypatch.setattr("brefine.export.to_onnx", lambda _: Program(file))
    for format, name in (("onnx", "model.onnx"), ("openvino", "model.xml")):
        out = tmp_path / "out" / name
        with pytest.raises(InputError, match=r"not written: it does not find what .* finds"):
            export(folder, out, format)
        assert list(out.parent.iterdir()) == []


@torch.no_grad()
def test_what_is_exported_of_a_trunk_has_its_features() -> None:
    torch.manual_seed(0)
    detector = {"fpn_norm": "group", "box_hidden": 32, "norm": "batch", "frozen_stages": 0}
    model: Any = create(
        "mask_rcnn",
        2,
        backbone="tf_efficientnet_lite0",
        channels=16,
        detector=Detector(**detector),  # type: ignore[arg-type]
    )
    for module in model.trunk.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    plain = simplify(model)
    kinds = {type(module) for module in plain.modules()}
    assert not kinds & {Conv2dSame, nn.BatchNorm2d, nn.GroupNorm}
    assert {Conv2dSame, nn.GroupNorm} < {type(module) for module in model.modules()}
    assert all(parameter.requires_grad for parameter in model.mask_head.parameters())
    for size in ((32, 32), (64, 160), (96, 32)):
        pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        images = Images(pixels, torch.tensor([size, (20, 30)]))
        for one, other in zip(model.features(images), plain.features(images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_masks_may_differ_where_rounding_decides_and_in_a_thousandth() -> None:
    mask = np.zeros((40, 60), bool)
    mask[3:33, 5:55] = True  # 1500 pixels

    def runs(*masks: np.ndarray) -> list[Runs]:
        return [of_window(each, (0, 0), each.shape) for each in masks]

    for count, good in ((0, True), (1, True), (2, False), (3, False)):
        row = np.zeros_like(mask)
        row[3, 5 : 5 + count] = True
        for sure, found in ((mask, mask & ~row), (mask & ~row, mask)):
            alike = _alike(*runs(sure, sure, found))
            assert alike == pytest.approx(1 - count / 1500)
            assert (alike > 0.999) == good
        assert _alike(*runs(mask & ~row, mask, mask)) == 1
        assert _alike(*runs(mask & ~row, mask, mask & ~row)) == 1
        empty = np.zeros_like(mask)
        assert _alike(*runs(empty, empty, row)) == float(count == 0)
        assert _alike(*runs(row, row, empty)) == float(count == 0)
        assert _alike(*runs(empty, row, empty)) == 1


def test_int8_says_what_it_costs(
    exports: Callable[[str], Made], toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file, parity = exports("margined")

    def make(_: Path, out: Path, format: str) -> Parity:
        assert format == "openvino"
        for suffix in (".xml", ".bin"):
            shutil.copy(file.with_suffix(suffix), out.with_suffix(suffix))
        return parity

    monkeypatch.setattr("brefine.int8.export", make)
    out, dataset = tmp_path / "out" / "small.xml", CocoSet(toy_set / "val.json")
    said, cost = export_int8(folder, out, [toy_set / "images"], dataset, limit=2)
    assert said is parity
    assert sorted(path.name for path in out.parent.iterdir()) == ["small.bin", "small.xml"]
    session, plain = Session(out, threads=1), Session(file.with_suffix(".xml"), threads=1)
    assert json.loads(session.metadata["int8"]) == asdict(cost)
    own = {"int8": "", "weights": ""}
    assert {**session.metadata, **own} == {**plain.metadata, **own}
    assert (cost.calibrated, cost.tested) == (7, 2)
    assert cost.time > 0
    nodes = openvino.Core().read_model(out).get_ops()
    assert "i8" in {
        output.element_type.get_type_name() for node in nodes for output in node.outputs()
    }
    coarse = [node for node in nodes if node.get_type_name() == "FakeQuantize"]
    assert len(coarse) > 10
    for node in coarse:  # nothing but maps and what layers are given: boxes need more digits
        readers = {each.get_node().get_type_name() for each in node.output(0).get_target_inputs()}
        assert node.get_output_partial_shape(0).rank.get_length() == 4 or readers == {"MatMul"}
    reports = evaluate_paths([out, plain.path], dataset, given_boxes=False, limit=2)
    for report, figures in zip(reports.values(), (cost.after, cost.before), strict=True):
        for key, value in figures.items():
            assert value == pytest.approx(report.values[key], nan_ok=True)
    assert exported.load(out, threads=1)(noise(96, 128), threshold=0.0)
    assert "on 2 pictures" in str(cost)

    monkeypatch.setattr("brefine.exported.Session.__call__", lambda *_: (np.zeros((0, 4)),))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="the model finds nothing in the pictures to calibrate"):
        export_int8(folder, tmp_path / "x.xml", [toy_set / "images"], dataset)
    bare = json.loads((toy_set / "val.json").read_text())
    blank = CocoSet.from_dict({**bare, "annotations": []}, tmp_path / "x.json", toy_set / "images")
    with pytest.raises(InputError, match="no object in the pictures to measure"):
        export_int8(folder, tmp_path / "x.xml", [toy_set / "images"], blank)
    images = [{**each, "file_name": "gone.png"} for each in bare["images"][:1]]
    lacking = {**bare, "images": images + bare["images"][1:]}
    gone = CocoSet.from_dict(lacking, tmp_path / "x.json", toy_set / "images")
    with pytest.raises(InputError, match=r"gone\.png: no such picture"):
        export_int8(folder, tmp_path / "x.xml", [toy_set / "images"], gone)
    bare["categories"][0]["name"] = "other"
    other = CocoSet.from_dict(bare, tmp_path / "x.json", toy_set / "images")
    with pytest.raises(InputError, match="is not in the model's table"):
        export_int8(folder, tmp_path / "x.xml", [toy_set / "images"], other)
    with pytest.raises(InputError, match=r"--out NAME\.xml"):
        export_int8(folder, tmp_path / "x.onnx", [toy_set / "images"], dataset)
    monkeypatch.setattr("brefine.int8.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'brefine\[int8\]'"):
        export_int8(folder, tmp_path / "x.xml", [toy_set / "images"], dataset)
    assert sorted(tmp_path.rglob("*")) == before


def test_suppress_is_class_by_class() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 0, 10, 9]]])
    scores = torch.tensor([[[0.5, 0.9, 0.3, 0.0], [0.8, 0.1, 0.0, 0.4]]])
    found = suppress(boxes, scores, 0.5, torch.tensor([0.05]))
    assert sorted(map(tuple, found.tolist())) == [(0, 0, 1), (0, 0, 2), (0, 1, 0)]
    assert suppress(boxes, scores, 0.5, torch.tensor([1.0])).shape == (0, 3)


@pytest.mark.parametrize("method", SMALL)
def test_graph_is_predict(folders: dict[str, Path], method: str) -> None:
    model: Any = weights.load(folders[method]).segmenter
    images = Images.stack(
        [torch.from_numpy(noise(64, 96, seed)).permute(2, 0, 1) for seed in range(2)]
    )
    with torch.inference_mode():
        expected = model.predict(images)
        least = torch.tensor([model.box_head.score_threshold])
        boxes, labels, scores, of, logits, *spans = Graph(model)(images.pixels, images.sizes, least)
    for i, one in enumerate(expected):
        torch.testing.assert_close(boxes[of == i], one.boxes)
        assert torch.equal(labels[of == i], one.labels)
        torch.testing.assert_close(scores[of == i], one.scores)
        torch.testing.assert_close(logits[of == i], one.logits, atol=1e-4, rtol=1e-4)
        if one.spans is not None:
            torch.testing.assert_close(spans[0][of == i], one.spans)


def test_the_two_files_of_openvino_belong_together(onnx_file: Made, tmp_path: Path) -> None:
    file = tmp_path / "model.xml"
    for suffix in (".xml", ".bin"):
        shutil.copy(onnx_file[1].with_suffix(suffix), file.with_suffix(suffix))
    assert Session(file, threads=1).metadata["format"] == "brefine"
    content = bytearray(file.with_suffix(".bin").read_bytes())
    content[len(content) // 2] ^= 1
    file.with_suffix(".bin").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.bin: not the one that model\.xml was"):
        Session(file, threads=1)


def test_a_file_is_named_after_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "brefine.export.export", lambda model, out, format: made.append(Path(out).resolve())
    )
    folder = tmp_path / "model" / "inside"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for name in ("../inside", ".", "..", str(folder)):
        assert main(["export", name]) == 0
    here = folder.with_name("inside.onnx")
    assert made == [here, here, tmp_path / "model.onnx", here]


def test_bad_input_is_one_line(
    exports: Callable[[str], Made],
    toy_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, file, _ = exports("brefine")
    capsys.readouterr()  # what exporting said

    def fails(text: str, *arguments: Any) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(each) for each in arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert text in lines[0]
        assert sorted(tmp_path.rglob("*")) == before

    fails("no such model folder", "export", tmp_path / "none")
    fails("--out NAME.onnx", "export", folder, "--out", tmp_path / "x.pt")
    fails("--out NAME.xml", "export", folder, "--format", "openvino", "--out", tmp_path / "x.onnx")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    fails("cannot write", "export", folder, "--out", tmp_path / "file" / "x.onnx")
    fails("a folder is in the way", "export", folder, "--out", tmp_path / "folder.onnx")
    intermediate = ("export", folder, "--format", "openvino", "--out")
    (tmp_path / "b.bin").mkdir()
    (tmp_path / "c.bin").write_text("of somebody else")
    fails("a folder is in the way", *intermediate, tmp_path / "b.xml")
    fails("c.bin: is there already, without c.xml", *intermediate, tmp_path / "c.xml")
    for name in ("mine.onnx", "mine.xml", "mine.bin"):
        (tmp_path / name).write_text("<mine/>")
    mine = "is there already, and not from brefine export"
    fails(f"mine.onnx: {mine}", "export", folder, "--out", tmp_path / "mine.onnx")
    fails(f"mine.xml: {mine}", *intermediate, tmp_path / "mine.xml")
    assert (tmp_path / "mine.onnx").read_text() == "<mine/>"
    assert (tmp_path / "mine.bin").read_text() == "<mine/>"
    fails("give --format openvino", "export", folder, "--int8", tmp_path)
    fails("an exported file has no parts", "info", file)
    labelled = ("evaluate", file, "--data", toy_set / "val.json", "--boxes", "detected")
    fails("an exported file can store nothing", *labelled, "--store")
    fails("nuclei: comes with the package", "evaluate", "nuclei", *labelled[2:], "--store")
    fails("go with --int8", "export", folder, "--limit", 3)
    Image.fromarray(noise(20, 20)).save(tmp_path / "x.png")
    predict = ("predict", tmp_path / "x.png", "--out", tmp_path / "out")
    content = file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    (tmp_path / "noise.onnx").write_bytes(b"not a model")
    (tmp_path / "noise.xml").write_text("<net>")
    foreign = onnx.load(file)
    foreign.ClearField("metadata_props")
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for values in (
        {"short_side": "-5"},
        {"short_side": "Infinity"},
        {"short_side": "96.5"},
        {"long_side": "1"},
        {"short_side": "20000", "long_side": "20000"},
        {"score_threshold": "NaN"},
        {"score_threshold": "true"},
    ):
        changed = onnx.load(file)
        for entry in changed.metadata_props:
            entry.value = values.get(entry.key, entry.value)
        onnx.save(changed, tmp_path / "sides.onnx")
        fails("its metadata has sides", predict[0], tmp_path / "sides.onnx", *predict[1:])
    for entry in changed.metadata_props:  # no limit to the long side is none
        if entry.key in ("long_side", "score_threshold"):
            entry.value = {"long_side": "1000000", "score_threshold": "0.5"}[entry.key]
    onnx.save(changed, tmp_path / "long.onnx")
    assert Session(tmp_path / "long.onnx", threads=1).long_side == 1_000_000
    graph = onnx.load(file)
    del graph.graph.output[-1]
    onnx.save(graph, tmp_path / "graph.onnx")
    for name, text in (
        ("graph.onnx", "its graph has 3 inputs and the outputs boxes, "),
        ("none.onnx", "no such file"),
        ("none.xml", "no such file"),
        ("cut.onnx", "damaged"),
        ("noise.onnx", "damaged"),
        ("noise.xml", "damaged"),
        ("foreign.onnx", "not written by brefine"),
    ):
        fails(text, predict[0], tmp_path / name, *predict[1:])
    for package, command in (
        ("onnxscript", ("export", folder, "--out", tmp_path / "y.onnx")),
        ("openvino", ("export", folder, "--format", "openvino", "--out", tmp_path / "y.xml")),
    ):
        monkeypatch.setattr(
            "brefine.export.find_spec", lambda name, package=package: name != package or None
        )
        fails(f"{package} is not installed: pip install 'brefine[", *command)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    fails("pip install 'brefine[onnx]'", predict[0], file, *predict[1:])
    monkeypatch.setitem(sys.modules, "openvino", None)
    (tmp_path / "z.xml").write_text("<net>")
    fails("pip install 'brefine[openvino]'", predict[0], tmp_path / "z.xml", *predict[1:])
