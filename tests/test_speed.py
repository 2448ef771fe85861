"""Profiles: what is metered is what predicts, its parts are the whole, and MACs are right."""

import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from brefine import cli, speed
from brefine.data.pictures import network_size
from brefine.parts import masks, roi, two_stage, winograd
from brefine.structures import Images, Instances
from conftest import TINY, tiny_recipe

CHANNELS, HIDDEN, PROPOSALS, DETECTIONS, CLASSES = 16, 32, 30, 5, 3
SIZE = (96, 128)
DETECTOR = TINY["detector"] | {"proposals": [PROPOSALS, PROPOSALS]}
OPTIONS = TINY | {"detector": DETECTOR}

#: parts of everything that has two stages
COMMON = """read resize trunk FPN RPN proposals |box RoIAlign 7|box head|detections
|mask RoIAlign 14|mask other|paste encode other"""
MASKS = {
    "mask_rcnn": "|mask convs 14|mask upsample 28|mask logits 28|",
    "brefine": "|mask main 14|mask auxiliary 14|mask context 14|mask RoIAlign 28|mask auxiliary 28"
    "|mask context 28|mask RoIAlign 56|mask auxiliary 56|mask context 56|mask logits 56|",
}


def names(text: str) -> set[str]:
    """Parts separated by blanks, or by bars where they have blanks inside."""
    if "|" not in text:
        return set(text.split())
    pieces = [piece.strip() for piece in text.split("|")]
    return {
        part
        for piece in pieces
        for part in ([piece] if piece.startswith(("mask ", "box ")) else piece.split())
    }


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe files by method."""
    folder = tmp_path_factory.mktemp("recipes")
    files = {}
    for method in MASKS:
        files[method] = folder / f"{method}.yaml"
        tiny_recipe(method, model={"options": OPTIONS}).save(files[method])
    return files


@pytest.fixture(scope="module")
def reports(recipes: dict[str, Path]) -> dict[str, speed.Report]:
    return {
        method: speed.profile(
            str(file), num_classes=CLASSES, detections=DETECTIONS, threads=1, rounds=3
        )
        for method, file in recipes.items()
    }


def test_the_stages_of_a_cascade_are_told_apart(recipes: dict[str, Path], tmp_path: Path) -> None:
    for method in ("cascade", "htc"):
        tiny_recipe(method, model={"options": OPTIONS}).save(tmp_path / "recipe.yaml")
        found = speed.profile(
            str(tmp_path / "recipe.yaml"), num_classes=2, detections=2, threads=1, rounds=1
        )
        for stage in (1, 2, 3):
            assert f"mask stage {stage} convs 14" in found.parts[speed.NAMES[0]]


# --- the meter


def test_parts_inside_parts_add_up_to_the_whole() -> None:
    clock, last = 0.0, 0.0

    def lap() -> tuple[float, ...]:
        nonlocal last
        used, last = clock - last, clock
        return (used, 2 * used)

    def work(seconds: float) -> Callable[[], float]:
        def run() -> float:
            nonlocal clock
            clock += seconds
            return seconds

        return run

    meter = speed.Meter(lap)
    inner = meter.watch(work(2), lambda seconds: f"inner {seconds}")
    plain = meter.watch(work(8), "plain", group="")
    before, after = work(1), work(4)

    def outer() -> str:
        before()
        inner()
        inner()
        plain()
        after()
        return "done"

    assert meter.watch(outer, "outer", group="group")() == "done"
    clock += 100  # outside of every part
    inner()
    assert meter.parts == {
        "group inner 2": (4, 8),
        "plain": (8, 16),
        "group outer": (5, 10),
        "inner 2": (2, 4),
    }


def test_what_raises_leaves_the_meter_with_the_part_around_it() -> None:
    values: Iterator[float] = iter([100, 1, 2, 4, 8])
    meter = speed.Meter(lambda: (next(values),))

    def broken() -> None:
        raise KeyError("x")

    def outer() -> None:
        with pytest.raises(KeyError):
            meter.watch(broken, "broken")()

    meter.watch(outer, "outer")()
    assert meter.parts == {"outer": (5,)}  # 1 before and 4 after; 2 were the broken part's


def test_peaks_are_joined_by_the_largest() -> None:
    values: Iterator[float] = iter([0, 3, 9, 0, 5, 1])
    meter = speed.Meter(lambda: (next(values),), max)
    for _ in range(3):
        meter.watch(lambda: None, "part")()
    assert meter.parts == {"part": (3,)}  # of 3, 0 and 1; the others lie between the calls


def test_peak_sees_what_is_freed_again() -> None:
    peak = speed.Peak()
    torch.ones(25_000_000)  # 100 MB, gone at once
    rise = peak()
    if not rise:
        pytest.skip("this system tells no peak")
    assert 95e6 < rise[0] < 130e6
    end = time.monotonic() + 10
    while peak()[0] >= 50e6:  # the system may take a moment to take freed memory back
        assert time.monotonic() < end


# --- a profile


@pytest.mark.parametrize("method", MASKS)
def test_every_part_has_a_name(reports: dict[str, speed.Report], method: str) -> None:
    parts = reports[method].parts
    assert set(parts["brefine"]) == names(COMMON) | names(MASKS[method]) | {"normalise"}
    assert set(parts["torchvision"]) == names(COMMON) | names(MASKS["mask_rcnn"])


@pytest.mark.parametrize("method", MASKS)
def test_parts_add_up_to_the_whole(reports: dict[str, speed.Report], method: str) -> None:
    report = reports[method]
    for name, whole in report.whole.items():
        parts = report.parts[name].values()
        assert sum(part.macs for part in parts) == whole.macs
        assert sum(part.cpu for part in parts) == pytest.approx(whole.cpu, rel=0.25)
        assert min(part.cpu for part in parts) >= 0
        assert all(part.peak is None or part.peak <= (whole.peak or 0) for part in parts)


def hand_count() -> dict[str, int]:
    """Multiply-adds of what both Mask R-CNNs share, but for widths of heads."""
    c, (height, width) = CHANNELS, network_size((480, 640), *SIZE)
    cells = [-(-height // s) * -(-width // s) for s in (4, 8, 16, 32, 64)]
    classes = HIDDEN * (CLASSES + 1 + 4 * CLASSES)
    return {
        "RPN": sum(cells) * (9 * c * c + 3 * c + 12 * c),
        "box head": PROPOSALS * (49 * c * HIDDEN + HIDDEN**2 + classes),
        "mask convs 14": DETECTIONS * 4 * 14**2 * 9 * c * c,
        "mask upsample 28": DETECTIONS * 28**2 * c * c,
        "mask logits 28": DETECTIONS * 28**2 * c,
    }


def test_macs_are_those_of_a_hand_count(reports: dict[str, speed.Report]) -> None:
    report = reports["mask_rcnn"]
    assert report.network == (96, 128)
    counted = {part: cost.macs for part, cost in report.parts["brefine"].items()}
    expected = hand_count()
    assert {part: counted[part] for part in expected} == expected
    silent = set(counted) - set(expected) - {"trunk", "FPN"}
    assert {part: counted[part] for part in silent if counted[part]} == {}
    theirs = report.parts["torchvision"]
    assert theirs["RPN"].macs == expected["RPN"]
    assert theirs["trunk"].macs == counted["trunk"] > 0
    assert theirs["FPN"].macs == counted["FPN"] > 0
    wide = DETECTIONS * 14**2 * 9 * 256 * (CHANNELS + 3 * 256)
    assert theirs["mask convs 14"].macs == wide


def test_macs_of_the_stages_are_those_of_a_hand_count(reports: dict[str, speed.Report]) -> None:
    c = CHANNELS
    parts = reports["brefine"].parts["brefine"]
    for side in (14, 28, 56):
        cells = DETECTIONS * side**2
        assert parts[f"mask auxiliary {side}"].macs == cells * 9 * c * c
        half = c // 2
        assert parts[f"mask context {side}"].macs == cells * (2 * c * half + 3 * 9 * half * half)
    assert parts["mask main 14"].macs == DETECTIONS * 14**2 * 4 * 9 * c * c
    assert parts["mask logits 56"].macs == DETECTIONS * 56**2 * c


@pytest.mark.parametrize("method", MASKS)
def test_what_is_metered_predicts_the_masks_of_the_forced_boxes(
    recipes: dict[str, Path], method: str
) -> None:
    torch.manual_seed(1)
    predictor, theirs = speed.open_pair(str(recipes[method]), [], CLASSES, None)
    model: Any = predictor.model
    nn.init.normal_(model.mask_head.logits.weight, std=1.0)
    picture = speed.draw_picture()
    forced = speed.Forced.draw(SIZE, PROPOSALS, DETECTIONS, CLASSES)
    found = speed.ours(predictor, picture, forced)(speed.Meter(speed.Timer()))
    images, _ = predictor._resize(speed.as_pixels(picture))
    given = Instances(SIZE, forced.boxes, forced.labels)
    with torch.inference_mode():
        (expected,) = model.predict(images, [given])
    runs = masks.paste_all(expected, (480, 640))
    assert [record["counts"] for record in found] == [run.encode()["counts"] for run in runs]
    assert len({record["counts"] for record in found}) == DETECTIONS
    rivals = speed.torchvisions(theirs, picture, forced)(speed.Meter(speed.Timer()))
    assert len(rivals) == DETECTIONS


def test_everything_is_in_its_place_again(recipes: dict[str, Path]) -> None:
    detect, pool = two_stage.detect, roi.pool
    predictor, theirs = speed.open_pair(str(recipes["brefine"]), [], CLASSES, None)
    forced = speed.Forced.draw(SIZE, PROPOSALS, DETECTIONS, CLASSES)
    picture = speed.draw_picture()
    model: Any = predictor.model
    systems = speed.ours(predictor, picture, forced), speed.torchvisions(theirs, picture, forced)
    for system in systems:
        system(speed.Meter(speed.Timer()))

        def broken(meter: speed.Meter) -> list[Any]:
            raise KeyError("x")

        with pytest.raises(KeyError):
            speed.System(broken, system.places)(speed.Meter(speed.Timer()))
    assert (two_stage.detect, roi.pool) == (detect, pool)
    for module in (*model.modules(), *theirs.modules()):
        assert not {"forward", "propose", "score", "predict"} & set(vars(module))
    assert torch.is_grad_enabled()


def test_layers_are_named_by_the_side_of_maps() -> None:
    name = speed._by_side("layer")
    assert name(torch.zeros(5, 8, 14, 14)) == "layer 14"
    assert name(torch.zeros(5, 28, 28)) == "layer 28"
    assert name(torch.zeros(7, 7)) == "layer"  # rows of features, not a map
    assert name(torch.zeros(2, 8, 784)) == "layer"
    assert name((torch.zeros(1, 1, 7, 7),)) == "layer"


def test_forced_boxes_are_inside_and_of_all_sizes() -> None:
    forced = speed.Forced.draw((400, 533), 1000, 300, 80)
    for boxes in (forced.proposals, forced.boxes):
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([533.0, 400, 533, 400])).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        assert 15.9 < sides.min() < 20
        assert sides.amax(0).tolist() == pytest.approx([0.6 * 533, 0.6 * 400], rel=0.1)
    assert len(forced.labels.unique()) > 60
    tiny = speed.Forced.draw((8, 8), 3, 2, 1)
    assert (tiny.boxes[:, 2:] > tiny.boxes[:, :2]).all()
    assert (tiny.boxes >= 0).all()
    assert (tiny.boxes <= 8).all()  # and not 16 pixels long: pasted, that is the whole picture


# --- the command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["profile", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_command_prints_json_of_a_model_folder(
    run: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "p.png"
    Image.new("RGB", (50, 40), "red").save(picture)
    threads: list[int] = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    options = ["--picture", picture, "--detections", 2, "--short-side", 64, "--rounds", 1]
    code, out, err = run(tiny_model, *options, "--threads", 2, "--json")
    assert code == 0, err
    assert threads == [1, 2, 1]
    values = json.loads(out)
    assert values["picture"] == [40, 50]
    assert values["network"] == [64, 80]
    assert (values["detections"], values["threads"], values["rounds"]) == (2, 2, 1)
    for name in ("brefine", "torchvision"):
        assert values["parts"][name]["trunk"]["macs"] > 0
        assert set(values["whole"][name]) == {"cpu", "wall", "macs", "peak"}
    whole = values["whole"]
    ratio = whole["brefine"]["cpu"] / whole["torchvision"]["cpu"]
    assert values["ratio"]["cpu"] == pytest.approx(ratio)


def test_command_prints_a_line_for_every_part(run: Any, recipes: dict[str, Path]) -> None:
    code, out, err = run(recipes["brefine"], "--detections", 2, "--rounds", 1, "--classes", 2)
    assert code == 0, err
    for part in names(COMMON) | names(MASKS["brefine"]) | names(MASKS["mask_rcnn"]) | {"all"}:
        assert part in out
    assert "1 threads" in " ".join(out.split())  # wherever the line is broken
    assert "ratio" not in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere"], "nowhere"),
        (["model.onnx"], "model.onnx: an exported file has no parts"),
        (["model.xml"], "name its model folder"),
        (["RECIPE", "--detections", 31], "looks at 30 proposals only"),
        (["RECIPE", "--picture", "nothing.png"], "nothing.png"),
        (["RECIPE", "--set", "model.options.stagse=2"], "stagse"),
        (["RECIPE", "--rounds", 0], "--rounds"),
        (["solo", "--set", "model.options.backbone=lcnet_035"], "only two-stage models"),
        (["FOLDER", "--set", "model.options.stages=2"], "leave out --set"),
    ],
)
def test_bad_input_is_one_line(
    run: Any, recipes: dict[str, Path], tiny_model: Path, arguments: list[Any], part: str
) -> None:
    known = {"RECIPE": recipes["brefine"], "FOLDER": tiny_model}
    code, out, err = run(*(known.get(each, each) for each in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


# --- the benchmarks


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Gives the module of ``benchmarks/NAME.py``."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


PAGE = "before\n<!-- made by benchmarks/{}.py -->\nold figures\n<!-- end -->\nafter\n"


def test_bench_speed_compares_resumes_and_writes_its_tables(
    recipes: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    benchmark: Callable[[str], Any],
) -> None:
    bench = benchmark("speed")
    page, results = tmp_path / "speed.md", tmp_path / "results" / "speed.json"
    page.write_text(PAGE.format("speed"))
    files = ["--page", page, "--results", results, "--classes", CLASSES, "--skip-peaks"]
    models = ["--full", recipes["brefine"], "--baseline", recipes["mask_rcnn"]]
    sizes = ["--short-side", 96, "--threads", 1, "--rounds", 1, "--light", "nothing"]

    def run(*more: object) -> str:
        bench.main([str(each) for each in (*files, *models, *sizes, *more)])
        return capsys.readouterr().err

    err = run("--detections", 2, 4, "--ways", "brefine", "*naive", "*torch")
    assert "nothing: no such recipe: left out" in err
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old figures" not in text
    assert "| way | 2 | 4 |" in text
    values = json.loads(results.read_text())
    assert set(values["cases"]) == {"96/1/2", "96/1/4"}
    for key, ways in values["cases"].items():
        assert set(ways) == {"torchvision", "brefine", "brefine:naive", "brefine:torch"}
        base = ways["torchvision"]
        for way, record in ways.items():
            assert str(record["objects"]) == key.rpartition("/")[2], way
            assert record["cpu_ratio"] == pytest.approx(record["cpu"] / base["cpu"])
            assert f"{record['cpu_ratio']:.2f} ({record['cpu']:.2f} s)" in text
    assert 0 < values["difference"]["96"]["head"] < 1e-5
    assert 0 < values["difference"]["96"]["whole"] < 1e-4
    run("--detections", 2, 4, 6, "--ways", "brefine", "mask_rcnn")
    again = json.loads(results.read_text())["cases"]
    for key in values["cases"]:
        assert again[key]["brefine"] == values["cases"][key]["brefine"]
        assert again[key]["mask_rcnn"]["rounds"] == 1
    assert set(again["96/1/6"]) == {"torchvision", "brefine", "mask_rcnn"}
    assert page.read_text().count("| way | 2 | 4 | 6 |") == 1


def test_naive_head_is_the_head_of_the_model(
    recipes: dict[str, Path], benchmark: Callable[[str], Any]
) -> None:
    bench = benchmark("speed")
    model = bench.settle(bench.build(bench.Recipe.load(recipes["brefine"]), CLASSES))
    forced = speed.Forced.draw((96, 128), 9, 9, CLASSES)
    rois = roi.rows([forced.boxes])
    with torch.inference_mode():
        features = model.features(Images.stack([speed.as_pixels(speed.draw_picture((96, 128)))]))
        logits = model.mask_head(features, rois, forced.labels)
        naive = bench.NaiveHead(model.mask_head)(features, rois, forced.labels)
    assert 1 < logits.std() < 16  # as those of a trained model
    assert torch.allclose(logits, naive, atol=1e-4)
    other = (forced.labels + 1) % CLASSES
    assert not torch.allclose(logits, model.mask_head(features, rois, other), atol=0.1)


def test_page_without_marks_is_refused(tmp_path: Path, benchmark: Callable[[str], Any]) -> None:
    bench = benchmark("speed")
    page = tmp_path / "speed.md"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the lines"):
        bench.main(["--tables-only", "--page", str(page), "--results", str(tmp_path / "r.json")])
    assert page.read_text() == "no marks"


def test_bench_train_step_compares_steps_on_the_same_rois(
    recipes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    benchmark: Callable[[str], Any],
) -> None:
    bench = benchmark("train_step")
    monkeypatch.setattr(bench, "PROPOSALS", 40)
    monkeypatch.setattr(winograd, "CHANNELS", 8)  # tiny ones, too
    recipe = recipes["brefine"]
    quickened = [
        sum(isinstance(module, winograd.TrainedConv) for module in model.modules())
        for model in (bench.build(recipe, []), bench.build(recipe, ["plain"]))
    ]
    assert quickened[0] > 6
    assert quickened[1] == 0
    page, results = tmp_path / "speed.md", tmp_path / "results.json"
    page.write_text(PAGE.format("train_step"))
    arguments = ["--page", page, "--results", results, "--recipe", recipes["brefine"]]
    arguments += ["--short-side", 96, "--threads", 1, "--rounds", 1, "--rois", 22, "--skip-peaks"]
    arguments += ["--option", "stages=1", "context=false", "--option", "plain"]
    bench.main([str(each) for each in arguments])
    (case,) = json.loads(results.read_text())["cases"].values()
    names = {"torchvision", "brefine", "brefine, stages=1, context=false", "brefine, plain"}
    assert set(case["ways"]) == names
    plain, quick = (case["ways"][name]["losses"] for name in ("brefine, plain", "brefine"))
    assert quick == pytest.approx(plain, rel=1e-3)
    for way, record in case["ways"].items():
        assert record["rois"] == {"boxes": 2 * (40 + 10), "masks": 22}, way
        assert all(math.isfinite(value) for value in record["losses"].values())
        assert f"| {way} | {record['cpu']:.2f} | {record['cpu_ratio']:.2f} |" in page.read_text()
    parts = case["parts"]
    assert {part for part in parts if "backward" in part and "Rank" not in part} == {
        f"{part} backward" for part in ("RPN", "boxes", "masks", "trunk")
    }
    assert min(parts.values()) >= 0
    for part in ("masks loss", "masks targets", "masks RoIAlign", "RPN Rank & Sort"):
        assert f"| {part} |" in page.read_text()


def test_gradients_of_a_step_in_parts_are_those_of_the_step(
    recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, benchmark: Callable[[str], Any]
) -> None:
    bench = benchmark("train_step")
    monkeypatch.setattr(bench, "PROPOSALS", 20)
    scene = bench.Scene(96, 2, 24)
    whole, parts = (bench.build(recipes["brefine"], []) for _ in range(2))
    bench.ours(whole, scene).step()
    bench.split(parts, scene)
    seen = 0
    for (name, one), (_, other) in zip(
        whole.named_parameters(), parts.named_parameters(), strict=True
    ):
        if one.grad is not None:
            assert other.grad is not None, name
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-6), name
            seen += bool(one.grad.abs().sum())
    assert seen > 100


def test_bench_train_step_names_an_unknown_option(
    recipes: dict[str, Path], benchmark: Callable[[str], Any]
) -> None:
    arguments = ["--recipe", str(recipes["brefine"]), "--option", "stagse=1", "--threads", "1"]
    with pytest.raises(SystemExit, match="stagse"):
        benchmark("train_step").main(arguments)


WORKER = """
import itertools, json, sys
values = {values}
for i, _ in enumerate(itertools.chain([0], sys.stdin)):
    if {dies} and i == 1:
        sys.exit(3)
    print(json.dumps(values if i == 0 else dict(cpu=values["cpu"] * i, wall=i, objects=7, peak=5)))
    sys.stdout.flush()
"""


def test_bench_peers_lets_processes_take_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], benchmark: Callable[[str], Any]
) -> None:
    bench = benchmark("peers")

    def command(values: dict[str, Any], dies: bool = False) -> list[str]:
        return [sys.executable, "-c", WORKER.format(values=values, dies=dies)]

    commands = {
        "torchvision": command({"cpu": 4.0}),
        "other": command({"cpu": 1.0}),
        "broken": command({"error": "OSError: no such package"}),
        "nothing": [sys.executable, "-c", "raise SystemExit(3)"],
    }
    ways = bench.take_turns(commands, 1, tmp_path, 3)
    assert set(ways) == {"torchvision", "other"}
    assert ways["other"] == {
        "cpu": 2.0,
        "wall": 2.0,
        "objects": 7,
        "peak": 5,
        "cpu_ratio": 0.25,
        "wall_ratio": 1.0,
    }
    err = capsys.readouterr().err
    assert "broken: left out: OSError: no such package" in err
    assert "nothing: left out: ended with 3" in err
    commands["late"] = command({"cpu": 1.0}, dies=True)
    with pytest.raises(SystemExit, match="late: ended with 3"):
        bench.take_turns(commands, 1, tmp_path, 3)
    with pytest.raises(SystemExit, match="nothing to compare with"):
        bench.take_turns({"other": commands["other"]}, 1, tmp_path, 1)
    text = bench.tables({"machine": {"cores": 2}, "cases": {"400/1": {"rounds": 3, "ways": ways}}})
    assert "| other | 2.00 | 0.25 | 2.00 | 1.00 | 5 | 7 |" in text


def test_bench_peers_leaves_out_what_cannot_be_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], benchmark: Callable[[str], Any]
) -> None:
    bench = benchmark("peers")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\ncase "$*" in *rfdetr) echo "no match" >&2; exit 1;; esac\n')
    python.chmod(0o755)
    found = bench.install(tmp_path, list(bench.PEERS))
    assert found == {"YOLO26s-seg": python}
    assert "RF-DETR-Seg Nano: left out: no match" in capsys.readouterr().err


def test_peer_answers_once_for_every_line() -> None:
    code = (
        "from peer import serve\n"
        "def build():\n"
        "    print('noise')\n"
        "    return lambda: 3\n"
        "serve(build)"
    )
    folder = Path(__file__).parents[1] / "benchmarks"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="go\ngo\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    first, *others = [json.loads(line) for line in done.stdout.splitlines()]
    assert first == {"objects": 3}
    assert [set(each) for each in others] == [{"cpu", "wall", "objects", "peak"}] * 2
    assert done.stderr == "noise\n"
