"""The command line: each command end to end on tiny data, and every mistake as one line."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import brefine
from brefine import __version__, cli
from conftest import TINY, tiny_recipe

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def one_line(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert sum(line.startswith("error:") for line in lines) == 1
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[-1]


# --- commands end to end


def test_train_evaluate_predict_info(
    run: Run, tmp_path: Path, toy_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_recipe().save("tiny.yaml")
    settings = [
        f"--set=data.train={toy_set}/train.json",
        f"--set=data.val={toy_set}/val.json",
        "--set=train.steps=2",
    ]
    code, out, err = run("train", "tiny.yaml", *settings)
    assert code == 0, err
    assert out.strip() == "runs/tiny/best"
    assert "2 steps" in err
    run_folder = Path("runs/tiny")
    assert {"best", "last", "recipe.yaml", "checkpoints"} <= {
        path.name for path in run_folder.iterdir()
    }
    one_line(run("train", "tiny.yaml", *settings), "runs/tiny", "already")

    code, out, err = run(
        "evaluate", "runs/tiny/best", "runs/tiny/last", "--data", toy_set / "val.json",
        "--out", "report.json", "--classes",
    )  # fmt: skip
    assert code == 0, err
    assert "AP50" in out
    assert "runs/tiny/last" in out
    assert "star" in out
    report = json.loads(Path("report.json").read_text())
    assert set(report) == {"runs/tiny/best", "runs/tiny/last"}
    assert {"mask/AP", "boundary/AP", "given_boxes/boundary_iou"} <= set(
        report["runs/tiny/best"]["values"]
    )

    pictures = sorted((toy_set / "images").iterdir())[:2]
    code, out, err = run("predict", "runs/tiny/best", *pictures, "--threshold", "0", "--out", "p")
    assert code == 0, err
    assert out.strip() == "p"
    assert {path.name for path in Path("p").iterdir()} == {
        "predictions.json", "idmaps", "overlays", "settings.json",
    }  # fmt: skip

    code, out, err = run("info", "runs/tiny/best", "--size", "96x128")
    assert code == 0, err
    assert "brefine, 4 classes" in out


def test_results_file_scores_like_the_model(
    run: Run, tmp_path: Path, toy_set: Path, tiny_model: Path
) -> None:
    data = toy_set / "val.json"
    out = tmp_path / "p"
    code, _, err = run(
        "predict", tiny_model, toy_set / "images", "--data", data, "--threshold", 0, "--out", out
    )
    one_line((code, "", err), "does not list this picture")  # the training pictures
    pictures = {entry["file_name"] for entry in json.loads(data.read_text())["images"]}
    files = [next(toy_set.rglob(Path(name).name)) for name in pictures]
    code, _, err = run(
        "predict", tiny_model, *files, "--data", data, "--threshold", 0, "--out", out
    )
    assert code == 0, err
    code, text, err = run(
        "evaluate", tiny_model, out / "predictions.json", "--data", data,
        "--boxes", "detected", "--out", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, err
    model, file = json.loads((tmp_path / "r.json").read_text()).values()
    assert 0 <= model["values"].pop("masks/touching") <= 1  # a file says nothing of RoIs
    assert model == file
    assert "IoU" not in text
    for kind in ("mask", "boundary", "box"):
        assert text.count(f"\n{kind} ") == 2
    code, text, err = run(
        "evaluate", out / "predictions.json", "--data", data, "--limit", 2,
        "--out", tmp_path / "few.json",
    )  # fmt: skip
    assert code == 0, err
    (few,) = json.loads((tmp_path / "few.json").read_text()).values()
    objects = [sum(c["objects"] for c in x["per_class"].values()) for x in (few, file)]
    assert 0 < objects[0] < objects[1]


def test_earlier_figures_are_replaced(run: Run, toy_set: Path, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("[]")
    for command, option, names in (
        ("evaluate", "--out", ["r.json"]),
        ("compare", "--json", ["r.json", "r.json"]),
    ):
        files = [tmp_path / name for name in names]
        out = tmp_path / f"{command}.json"
        for _ in range(2):
            code, _, err = run(
                command, *files, "--data", toy_set / "val.json", option, out,
                *(["--resamples", 100] if command == "compare" else ["--boxes", "detected"]),
            )  # fmt: skip
            assert code == 0, err


def test_what_is_left_out_of_a_set_is_said(run: Run, toy_set: Path, tmp_path: Path) -> None:
    content = json.loads((toy_set / "val.json").read_text())
    content["annotations"][0]["category_id"] = 99
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "r.json").write_text("[]")
    code, _, err = run("evaluate", tmp_path / "r.json", "--data", tmp_path / "val.json",
                       "--images", toy_set / "images", "--boxes", "detected")  # fmt: skip
    assert code == 0
    assert "val.json: 1 annotations cannot be used and are left out, first: " in err


def test_evaluate_in_true_boxes_alone(run: Run, toy_set: Path, tiny_model: Path) -> None:
    code, out, err = run(
        "evaluate", tiny_model, "--data", toy_set / "val.json", "--boxes", "ground-truth"
    )
    assert code == 0, err
    assert "IoU" in out
    assert "AP" not in out


def test_skip_broken_names_them_and_says_so_in_the_exit_code(
    run: Run, tmp_path: Path, tiny_model: Path
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text")
    arguments = ("predict", tiny_model, tmp_path, "--out", tmp_path.parent / "out")
    code, out, err = run(*arguments, "--save", "coco")
    assert (code, out) == (2, "")
    assert "out.part: 1 of 2 pictures are done: the same command with --resume goes on" in err
    assert "b.png" in err.splitlines()[-1]
    assert not (tmp_path.parent / "out").exists()
    code, _, err = run(*arguments, "--save", "coco", "--resume", "--skip-broken")
    assert code == 2
    assert "b.png: no picture" in err.splitlines()[-1]
    made = sorted(path.name for path in (tmp_path.parent / "out").iterdir())
    assert made == ["predictions.json", "settings.json"]


def test_toy(run: Run, tmp_path: Path) -> None:
    code, _, err = run("toy", tmp_path / "t", "--train", 2, "--val", 1, "--size", "64x80")
    assert code == 0, err
    assert len(json.loads((tmp_path / "t" / "train.json").read_text())["images"]) == 2
    assert {Image.open(p).size for p in (tmp_path / "t" / "images").iterdir()} == {(80, 64)}
    one_line(run("toy", tmp_path / "t"), str(tmp_path / "t"))


def test_demo_passes_its_options_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = pytest.importorskip("brefine.demo")
    calls = []
    monkeypatch.setattr(demo, "run", lambda out, seed: calls.append((out, seed)))
    assert run("demo", "--out", "d", "--seed", "3")[0] == 0
    assert calls == [(Path("d"), 3)]


def test_resume_is_passed_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_recipe(data={"train": "t.json"}).save("tiny.yaml")
    one_line(run("train", "tiny.yaml", "--resume"), "no checkpoint to resume from")


# --- what a model costs


def numbers(out: str) -> dict[str, list[str]]:
    rows = [re.split(r"\s*│\s*", line.strip("│ \n")) for line in out.splitlines() if "│" in line]
    return {row[0].strip(): row[1:] for row in rows}


def test_info_of_the_paper_s_heads(run: Run) -> None:
    """Multiply-adds of a RoI, by hand: 14, 28 and 56 cells, 256 channels, the module at half."""
    code, out, err = run("info", "brefine", "--size", "64x96")
    assert code == 0, err
    rows = numbers(out)
    c, half = 256, 128
    cells = [14**2, 28**2, 56**2]
    main = 4 * cells[0] * 9 * c * c
    auxiliary = sum(cells) * 9 * c * c
    context = sum(cells) * (2 * c * half + 3 * 9 * half * half)
    logits = cells[2] * c
    assert float(rows["main"][1]) == round(main / 1e9, 3)
    assert float(rows["auxiliary"][1]) == round(auxiliary / 1e9, 3)
    assert float(rows["context"][1]) == round(context / 1e9, 3)
    assert float(rows["mask_head"][1]) == round((main + auxiliary + context + logits) / 1e9, 3)
    assert rows["mask_head"][2] == "100"
    conv = 9 * c * c + c
    module = 2 * c * half + c + half + 3 * (9 * half * half + half)
    parameters = 7 * conv + 3 * module + 80 * (c + 1)
    assert rows["mask_head"][0] == f"{parameters:,}"


def test_info_of_a_recipe(run: Run, tmp_path: Path) -> None:
    tiny_recipe("mask_rcnn").save(tmp_path / "r.yaml")
    code, out, err = run(
        "info", tmp_path / "r.yaml", "--classes", 7, "--size", "64x64", "--detections", 10
    )
    assert code == 0, err
    channels, rows = TINY["channels"], numbers(out)
    macs = 196 * 4 * 9 * channels**2 + 196 * 4 * channels**2 + 784 * channels
    assert float(rows["mask_head"][1]) == round(macs / 1e9, 3)
    assert rows["mask_head"][2] == "10"
    assert "7 classes" in out
    code, smaller, _ = run(
        "info", tmp_path / "r.yaml", "--set", "model.options.num_convs=0", "--size", "64x64"
    )
    assert numbers(smaller)["mask_head"][0] != rows["mask_head"][0]
    total = sum(int(rows[p][0].replace(",", "")) for p in ("trunk", "rpn", "box_head", "mask_head"))
    assert rows["all"][0] == f"{total:,}"


# --- mistakes


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_set: Path, tiny_model: Path) -> Path:
    """A folder full of things that are wrong in one way each."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "model")
    shutil.copytree(toy_set, "toy")
    data = {"train": "toy/train.json", "val": "toy/val.json"}
    tiny_recipe(data=data).save("good.yaml")
    text = Path("good.yaml").read_text()
    Path("typo.yaml").write_text(text.replace("steps: 2", "stepz: 2"))
    Path("type.yaml").write_text(text.replace("lr: 0.001", "lr: fast"))
    Path("broken.yaml").write_text("model: [")
    content = json.loads(Path("toy/train.json").read_text())
    Path("toy/empty.json").write_text(json.dumps({**content, "annotations": []}))
    Path("toy/truncated.json").write_text(Path("toy/train.json").read_text()[:200])
    Path("toy/list.json").write_text("[]")
    other = [{**entry, "id": entry["id"] + 1} for entry in content["categories"]]
    shifted = [{**a, "category_id": a["category_id"] + 1} for a in content["annotations"]]
    Path("toy/other.json").write_text(
        json.dumps({**content, "categories": other, "annotations": shifted})
    )
    gone = [{**entry, "file_name": f"gone/{entry['file_name']}"} for entry in content["images"]]
    Path("toy/gone.json").write_text(json.dumps({**content, "images": gone}))
    wide = [{**entry, "width": entry["width"] + 1} for entry in content["images"]]
    Path("toy/wide.json").write_text(json.dumps({**content, "images": wide}))
    spoil(Path("model"), Path("nan"))
    Path("page.html").write_text("<title>Mine</title>")
    Path("garden.html").write_text("<head><title>Evaluation of my garden</title>")
    Path("evaluation.json").write_text('{"values": {"mask/AP": 0.3}}')  # of a run
    Path("draws.json").write_text('{"resamples": 3}')
    Path("photo.jpg").write_text("no picture")
    Path("results.json").write_text('{"a": 1}')
    Path("records.json").write_text('[{"image_id": 1}]')
    Path("folder").mkdir()
    Image.new("RGB", (40, 30)).save("ok.png")
    return tmp_path


def spoil(model: Path, out: Path) -> None:
    """A copy of a model folder with a weight that is no number."""
    shutil.copytree(model, out)
    file = out / "model.safetensors"
    with safe_open(file, "pt") as held:
        about = held.metadata()
        state = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118
    next(v for v in state.values() if v.is_floating_point()).view(-1)[0] = float("nan")
    save_file(state, file, about)


MISTAKES: list[tuple[Sequence[str], Sequence[str]]] = [
    (["trian"], ["trian"]),
    (["--bogus"], ["--bogus"]),
    (["train"], ["--help"]),
    (["train", "none.yaml"], ["none.yaml: no such recipe"]),
    (["train", "folder"], ["folder: cannot read the recipe"]),
    (["train", "typo.yaml"], ["typo.yaml: train.stepz: unexpected keyword (did you mean steps?)"]),
    (["train", "type.yaml"], ["type.yaml: train.lr: "]),
    (["train", "broken.yaml"], ["broken.yaml", "no valid YAML"]),
    (["train", "good.yaml", "--set", "train.lr"], ["--set train.lr: expected KEY=VALUE"]),
    (["train", "good.yaml", "--set", "train.lrr=1"], ["train.lrr", "did you mean lr?"]),
    (["train", "good.yaml", "--set", "model.method=yolo"], ["unknown method 'yolo'"]),
    (["train", "good.yaml", "--set", "model.options.stages=4"], ["stages must be 1, 2 or 3"]),
    (["train", "good.yaml", "--set", "model.options.backbone=resnet5"], ["resnet5"]),
    (["train", "good.yaml", "--set", "model.weights=w.pth"], ["w.pth: no such file"]),
    (["train", "good.yaml", "--set", "data.train=null"], ["data.train"]),
    *(
        (
            ["train", "good.yaml", "--set", "train.seed=1", "--set", f"{key}={value}"],
            [f"error: --set {key}={value}: ", f": {key}", *parts],
        )
        for key, value, *parts in (
            ("train.lr", ".nan"),
            ("train.steps", "true"),
            ("model.options.detector.anchor_scale", "-2"),
            ("model.options.detector.anchor_scale", ".nan"),
            ("model.options.detector.nms", "5"),
            ("model.options.detector.score_threshold", ".nan"),
            ("model.options.detector.detections", "0"),
            ("model.options.detector.mask_rois", "-1"),
            ("model.options.detector.proposals", "[0, 0]"),
            ("model.options.detector.rpn_weight", ".nan"),
            ("model.options.detector.frozen_stages", "-1"),
        )
    ),
    *(
        (["train", "good.yaml", "--set", f"model.options.{setting}"], parts)
        for setting, parts in (
            ("channels=0", ["model.options.channels: "]),
            (
                "detector.anchor_scal=2",
                ["model.options.detector.anchor_scal: ", "did you mean anchor_scale?"],
            ),
            ("detector.frozen_stages=99", ["frozen_stages is 99: ", "stages"]),
        )
    ),
    (["train", "good.yaml", "--set", "data.val=toy/gone.json"], ["gone", "no such picture"]),
    (
        ["train", "good.yaml", "--set", "data.val=toy/wide.json"],
        [".png: ", "but toy/wide.json says", "correct the json"],
    ),
    (
        ["evaluate", "model", "--data", "toy/wide.json"],
        [".png: ", "but toy/wide.json says", "correct the json"],
    ),
    (["predict", "nan", "ok.png"], ["nan/model.safetensors: ", "not finite"]),
    (["train", "good.yaml", "--set", "data.train=none.json"], ["none.json"]),
    (["train", "good.yaml", "--set", "data.train=toy/empty.json"], ["no usable annotation"]),
    (["train", "good.yaml", "--set", "data.train=toy/truncated.json"], ["toy/truncated.json"]),
    (["train", "good.yaml", "--set", "data.train=toy/list.json"], ["toy/list.json"]),
    (["train", "good.yaml", "--set", "data.train=toy/gone.json"], ["gone"]),
    (["train", "good.yaml", "--set", "data.val=toy/other.json"], ["toy/other.json", "categories"]),
    (["train", "good.yaml", "--set", "data.images=none"], ["none: no such folder"]),
    (["train", "good.yaml", "--out", "toy"], ["toy"]),
    (["train", "good.yaml", "--out", "ok.png"], ["ok.png"]),
    (["evaluate", "model"], ["--data"]),
    (["evaluate", "--data", "toy/val.json"], ["MODEL"]),
    (["evaluate", "none", "--data", "toy/val.json"], ["none: no such model folder"]),
    (["evaluate", "folder", "--data", "toy/val.json"], ["folder: has no model.safetensors"]),
    (["evaluate", "model", "--data", "none.json"], ["none.json"]),
    (["evaluate", "model", "--data", "toy/other.json"], ["toy/other.json", "model's table"]),
    (["evaluate", "model", "--data", "toy/gone.json"], ["gone", "no such picture"]),
    (["evaluate", "model", "--data", "toy/val.json", "--boxes", "some"], ["some"]),
    (["evaluate", "model", "--data", "toy/val.json", "--limit", "0"], ["--limit"]),
    (["evaluate", "none.json", "--data", "toy/val.json"], ["none.json: No such file"]),
    (["evaluate", "results.json", "--data", "toy/val.json"], ["results.json"]),
    (["evaluate", "photo.jpg", "--data", "toy/val.json"], ["photo.jpg: no COCO results"]),
    (
        ["evaluate", "records.json", "--data", "toy/val.json", "--boxes", "ground-truth"],
        ["records.json: results have no masks for true boxes"],
    ),
    (
        ["evaluate", "records.json", "--data", "toy/val.json", "--official"],
        ["toy/val.json: not Cityscapes"],
    ),
    (["evaluate", "records.json", "--data", "toy/val.json"], ["records.json", "key"]),
    (
        ["evaluate", "model", "--data", "toy/val.json", "--boxes", "ground-truth", "--classes"],
        ["--classes"],
    ),
    *(
        (["evaluate", "records.json", "--data", "toy/val.json", option, file], [option, *parts])
        for option, file, parts in (
            ("--out", "toy/val.json", ["what is to be read"]),
            ("--out", "toy/../records.json", ["what is to be read"]),
            ("--out", "toy/train.json", ["there already"]),
            ("--out", "toy", ["ends in .json"]),
            ("--out", "ok.png", ["ends in .json"]),
            ("--report", "toy/val.json", ["ends in .html"]),
            ("--report", "page.html", ["there already"]),
            ("--out", "evaluation.json", ["there already"]),
            ("--report", "garden.html", ["there already"]),
        )
    ),
    (
        [
            "compare",
            "results.json",
            "records.json",
            "--data",
            "toy/val.json",
            "--json",
            "records.json",
        ],
        ["--json records.json: is what is to be read"],
    ),
    (
        ["compare", "results.json", "model", "--data", "toy/val.json", "--json", "draws.json"],
        ["there already"],
    ),
    (["predict", "model"], ["Missing argument"]),
    (["predict", "none", "ok.png"], ["none: no such model folder"]),
    (["predict", "model", "none.png"], ["none.png: no such picture"]),
    (["predict", "model", "photo.jpg"], ["photo.jpg: no picture"]),
    (["predict", "model", "folder"], ["folder: no pictures there"]),
    (["predict", "model", "*.nope"], ["*.nope: no pictures there"]),
    (["predict", "model", "ok.png", "--out", "toy"], ["toy: holds something else"]),
    (["predict", "model", "ok.png", "--out", "good.yaml"], ["good.yaml"]),
    (["predict", "model", "ok.png", "--save", "coco,pgn"], ["'pgn' is none of"]),
    (["predict", "model", "ok.png", "--threshold", "high"], ["--threshold"]),
    (["predict", "model", "ok.png", "--threshold", "7"], ["--threshold"]),
    (["info", "none.yaml"], ["none.yaml: no such recipe"]),
    (["info", "folder"], ["folder: has no model.safetensors"]),
    (["info", "brefine", "--size", "800"], ["'800' is no HEIGHTxWIDTH"]),
    (["info", "brefine", "--size", "0x5"], ["'0x5' is no HEIGHTxWIDTH"]),
    (["info", "brefine", "--classes", "0"], ["--classes"]),
    (["info", "model", "--set", "train.lr=1"], ["leave out --set"]),
    (["toy", "toy"], ["toy"]),
    (["toy", "t", "--size", "1x1"], ["1 x 1"]),
    (["toy", "ok.png/t", "--train", "1", "--val", "0"], ["ok.png/t"]),
    (["demo", "--seed", "-1"], ["--seed"]),
]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=lambda value: " ".join(value)[:50])
def test_a_mistake_is_one_line(
    run: Run, place: Path, arguments: Sequence[str], parts: Sequence[str]
) -> None:
    before = snapshot(place)
    one_line(run(*arguments), *parts)
    assert snapshot(place) == before  # nothing written, nothing damaged


def test_a_fault_of_ours_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from brefine import recipe

    def fault(_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(recipe.Recipe, "load", fault)
    with pytest.raises(ValueError, match="a bug"):
        run("train", "x.yaml")


def test_interrupt_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from brefine import recipe

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe.Recipe, "load", interrupt)
    code, out, err = run("train", "x.yaml")
    assert (code, out, err) == (130, "", "interrupted\n")


# --- as a process


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "brefine", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_version_and_help_are_light() -> None:
    done = start("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"brefine {__version__}\n", "")
    # what the names of the package stand for is loaded on first use
    code = "import sys, brefine.cli; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    done = start("--help")
    assert done.returncode == 0
    for command in ("train", "evaluate", "predict", "info", "demo", "toy"):
        assert command in done.stdout


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "brefine", "toy", str(tmp_path / "set"), "--train", "9000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not any(tmp_path.rglob("*.png")):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert said.splitlines()[-1] == "terminated"
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_there_is_help() -> None:
    done = start()
    assert "Usage" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_mistake_as_a_process(tmp_path: Path) -> None:
    done = start("train", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_public_names() -> None:
    assert {"METHODS", "Predictor", "create", "load"} <= set(dir(brefine))
    assert set(brefine.METHODS) >= {"brefine", "mask_rcnn"}
    assert brefine.create("mask_rcnn", 2, **TINY).num_classes == 2
    assert brefine.load.__module__ == brefine.Predictor.__module__ == "brefine.predict"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        brefine.lod  # type: ignore[attr-defined]  # noqa: B018


def test_half_a_surrogate_pair_can_be_printed(run: Run, tmp_path: Path) -> None:
    """Legal in json, but a print of it would end in a traceback."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"shapes": ["\\ud800"], "imagePath": "a.png"}')
    one_line(run("data", "stats", tmp_path / "a.json"), "shapes[0]: ?, expected an object")
