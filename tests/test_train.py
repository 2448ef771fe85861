import csv
import json
import math
import shutil
import signal

import pytest
import timm
import torch
from lightning.fabric import accelerators as fabric
from lightning.pytorch import accelerators as pytorch
from PIL import Image
from torch import nn

import brefine.train as training
from brefine import demo, weights
from brefine.checkpoints import read
from brefine.data import toy
from brefine.methods import create
from brefine.recipe import Recipe, TrainRecipe
from brefine.structures import InputError
from brefine.train import Learner, train

MODEL = {
    "backbone": "test_efficientnet_gn.r160_in1k",
    "channels": 16,
    "detector": {
        "frozen_stages": 0,
        "fpn_norm": "group",
        "box_hidden": 16,
        "candidates": (50, 50),
        "proposals": (20, 20),
        "mask_rois": 4,
        "detections": 5,
    },
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.draw(folder, train=6, val=2, size=(64, 80), seed=3, progress=False)
    return folder


def recipe(folder, *settings, method="mask_rcnn"):
    values = {
        "model": {"method": method, "options": MODEL},
        "data": {
            "train": folder / "train.json",
            "val": folder / "val.json",
            "short_side": 64,
            "long_side": 80,
            "workers": 0,
        },
        "train": {"steps": 4, "batch_size": 2, "lr": 0.01, "warmup_steps": 2, "milestones": 3},
    }
    return Recipe.parse(values, "test").with_settings(settings)


def rows(path):
    """The rows of losses, without those of evaluations."""
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize("method", ["mask_rcnn", "brefine"])
def test_a_run_folder_tells_everything_about_the_run(pictures, tmp_path, method):
    used = recipe(pictures, method=method)
    best = train(used, tmp_path / "run")
    run = tmp_path / "run"
    assert best == run / "best"
    assert Recipe.load(run / "recipe.yaml") == used
    versions = json.loads((run / "versions.json").read_text())
    assert versions["torch"] == torch.__version__.split("+")[0]
    assert (versions["seed"], versions["steps"], versions["lr"]) == (0, 4, 0.01)
    table = json.loads((run / "categories.json").read_text())
    assert [row["id"] for row in table] == [category.id for category in toy.CATEGORIES]
    (logged,) = rows(run / "metrics.csv")  # of step 0; one every 10
    parts = ["rpn", "cls"] if method == "mask_rcnn" else ["rpn_rank", "rpn_sort", "cls_rank"]
    extra = ["cls_sort"] if method == "brefine" else []
    total = sum(float(logged[name]) for name in [*parts, *extra, "rpn_box", "box", "mask"])
    assert float(logged["loss"]) == pytest.approx(total, rel=1e-5)
    assert float(logged["grad_mask_head"]) > 0
    assert (method == "brefine") == ("raw_mask" in logged)
    figures = json.loads((run / "evaluation.json").read_text())["values"]
    assert {"mask/AP", "boundary/AP", "box/AP", "given_boxes/boundary_iou"} <= figures.keys()
    assert weights.load(run / "last").categories == list(toy.CATEGORIES)
    assert weights.load(best).recipe == used


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(pictures, tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        used = recipe(pictures, "train.steps=2", f"train.seed={seed}", "data.val=null")
        folder = train(used, tmp_path / name)
        states.append(weights.load(folder).segmenter.state_dict())
    first, second, third = states
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


def test_a_run_that_broke_goes_on_where_it_stopped(pictures, tmp_path, monkeypatch):
    step, seen = Learner.training_step, []

    def breaking(self, batch, index):
        seen.append(self.global_step)
        if self.global_step == 4 and len(seen) < 6:
            raise RuntimeError("power cut")
        return step(self, batch, index)

    monkeypatch.setattr(Learner, "training_step", breaking)
    used = recipe(pictures, "train.steps=5", "data.val=null")  # 3 steps an epoch
    with pytest.raises(RuntimeError, match="power cut"):
        train(used, tmp_path / "run")
    train(used, tmp_path / "run", resume=True)
    assert seen == [0, 1, 2, 3, 4, 3, 4]
    assert weights.load(tmp_path / "run/last").recipe == used


def test_ctrl_c_stops_training_as_everywhere_else(pictures, tmp_path, monkeypatch):
    def interrupted(self, batch, index):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(pictures), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "run/last").exists()


def test_best_is_the_model_with_the_highest_mask_ap(pictures, tmp_path, monkeypatch):
    scores = iter([0.1, 0.3, 0.2])
    evaluate = training.evaluate

    def scored(*args, **options):
        report = evaluate(*args, **options)
        report.values["mask/AP"] = next(scores)
        return report

    monkeypatch.setattr(training, "evaluate", scored)
    used = recipe(pictures, "train.steps=null", "train.epochs=3", "train.validate_every=1")
    train(used, tmp_path / "run")
    assert "| mask/AP | 0.3000 |" in (tmp_path / "run/best/README.md").read_text()
    assert "| mask/AP | 0.2000 |" in (tmp_path / "run/last/README.md").read_text()


def test_pictures_to_learn_from_and_to_test_on_may_lie_apart(pictures, tmp_path):
    for name in ("train", "val"):  # COCO's own layout
        (tmp_path / name).mkdir()
        for file in (pictures / "images").glob(f"{name}_*"):
            shutil.copy(file, tmp_path / name)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        shutil.copy(pictures / f"{name}.json", tmp_path / "annotations")
    apart = [f"data.images={tmp_path / 'train'}", f"data.val_images={tmp_path / 'val'}"]
    used = recipe(tmp_path / "annotations", "train.steps=1", *apart)
    assert train(used, tmp_path / "run").is_dir()


@pytest.mark.parametrize(
    ("method", "precision"),
    [("mask_rcnn", "bf16-mixed"), ("brefine", "bf16-mixed"), ("brefine", "16-mixed")],
)
def test_mixed_precision_keeps_losses_finite_and_weights_float32(
    pictures, tmp_path, method, precision, capsys
):
    mixed = [f"train.precision={precision}", "train.steps=2", "data.val=null"]
    train(recipe(pictures, *mixed, method=method), tmp_path / "run")
    other = precision == "16-mixed" and not torch.cuda.is_available()
    assert ("a CPU computes bf16-mixed instead" in "".join(capsys.readouterr())) == other
    (logged,) = rows(tmp_path / "run/metrics.csv")
    assert all(math.isfinite(float(value)) for value in logged.values())
    state = weights.load(tmp_path / "run/last").segmenter.state_dict()
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


def learner(**options):
    values = {"lr": 0.1, "steps": 100, "warmup_steps": 10, "milestones": (60, 90), **options}
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    return Learner(model, TrainRecipe(**values), steps=100, epoch=20, devices=2)


def test_schedules_warm_up_then_step_or_follow_a_cosine():
    rate = learner().rate
    assert [rate(s) for s in (0, 4, 9, 59)] == pytest.approx([0.1, 0.5, 1, 1])
    assert [rate(s) for s in (60, 89, 90, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    rate = learner(schedule="cosine", warmup_steps=0).rate
    assert [rate(s) for s in (0, 25, 50, 100)] == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, 0])
    rate = learner(milestones=None, warmup_steps=0).rate
    assert [rate(s) for s in (66, 67, 91, 92)] == pytest.approx([1, 0.1, 0.1, 0.01])
    rate = learner(steps=None, epochs=5, milestones=(3, 4)).rate  # 20 steps an epoch
    assert [rate(s) for s in (59, 60, 79, 80)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_the_rate_is_scaled_with_all_pictures_of_a_step():
    assert learner(batch_size=3).lr == 0.1
    assert learner(batch_size=3, lr_reference_batch=2).lr == pytest.approx(0.3)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_biases_and_norms_do_not_decay_and_frozen_weights_are_left_out(name, kind):
    optimizer = learner(optimizer=name, weight_decay=0.05).configure_optimizers()["optimizer"]
    assert isinstance(optimizer, kind)
    decayed, free = optimizer.param_groups
    assert (len(decayed["params"]), decayed["weight_decay"]) == (0, 0.05)
    assert (len(free["params"]), free["weight_decay"]) == (3, 0.0)


def test_blocks_of_the_trunk_learn_slower_the_nearer_they_are_to_the_picture():
    model = create("mask_rcnn", 3, **MODEL)
    values = {"lr": 0.1, "steps": 9, "layer_decay": 0.5, "freeze": ["trunk.fpn.*", "rpn.conv.bias"]}
    made = Learner(model, TrainRecipe(**values), steps=9, epoch=3, devices=1)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {}
    for group in made.configure_optimizers()["optimizer"].param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["initial_lr"]
            assert group["weight_decay"] == (1e-4 if parameter.ndim > 1 else 0)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert rates.keys() == learning
    assert all(not n.startswith("trunk.fpn") and n != "rpn.conv.bias" for n in learning)
    body = [rate for name, rate in rates.items() if name.startswith("trunk.body")]
    blocks = sorted(set(body))
    assert blocks == pytest.approx([0.1 * 0.5**k for k in range(len(blocks), 0, -1)])
    assert len(blocks) > 3
    ordered = [rates[n] for n, _ in model.named_parameters() if n.startswith("trunk.body")]
    assert ordered == sorted(ordered)
    assert {rate for name, rate in rates.items() if not name.startswith("trunk.body")} == {0.1}
    with pytest.raises(
        InputError, match=r"train\.freeze: 'head\.\*' fits no parameter: .*trunk\.\*"
    ):
        Learner(model, TrainRecipe(**{**values, "freeze": ["head.*"]}), steps=9, epoch=3, devices=1)
    with pytest.raises(InputError, match=r"train\.freeze: nothing is left to learn"):
        Learner(model, TrainRecipe(**{**values, "freeze": ["*"]}), steps=9, epoch=3, devices=1)


@pytest.mark.parametrize(
    ("name", "stem", "blocks"),
    [
        ("resnet18", ("conv1.weight", "bn1.weight"), [2, 2, 2, 2]),
        ("convnext_atto", ("stem_0.weight", "stem_1.weight"), [2, 3, 7, 3]),
        ("swin_tiny_patch4_window7_224", ("patch_embed.proj.weight",), [2, 3, 7, 3]),
    ],
)
def test_a_block_is_one_in_every_kind_of_trunk(name, stem, blocks):
    """With ConvNeXt and Swin what makes a stage's maps smaller is a block of its own."""
    body = timm.create_model(name, features_only=True, pretrained=False)
    holder = nn.Module()
    holder.trunk = nn.Module()
    holder.trunk.body = body
    depths = training.depths_of(holder)
    assert {depths[f"trunk.body.{each}"] for each in stem} == {0}
    assert len(set(depths.values())) == 1 + sum(blocks)


def test_a_loss_that_explodes_ends_the_run_with_its_name(pictures, tmp_path):
    used = recipe(pictures, "train.lr=1e30", "train.warmup_steps=0")
    with pytest.raises(InputError, match=r"step \d: the loss is not finite .*train\.lr"):
        train(used, tmp_path / "run")
    assert not (tmp_path / "run/last").exists()


def test_pictures_that_are_learnt_from_and_validated_on_are_counted(pictures, tmp_path, capsys):
    """Behind links, too; by the file, not by its name; and none that lies in one set only."""
    for name in ("mixed", "copied"):
        (tmp_path / name).mkdir()
    linked, *others = sorted((pictures / "images").glob("train_*"))
    (tmp_path / "mixed/val_00000.png").symlink_to(linked)
    shutil.copy(pictures / "images/val_00001.png", tmp_path / "mixed")
    for file, name in zip(others, ("val_00000.png", "val_00001.png"), strict=False):
        shutil.copy(file, tmp_path / "copied" / name)
    for settings, shared in (
        ([], 0),
        ([f"data.val={pictures / 'train.json'}"], 6),
        ([f"data.val_images={tmp_path / 'mixed'}"], 1),
        ([f"data.val_images={tmp_path / 'copied'}"], 0),
    ):
        with pytest.raises(InputError, match=r"nothing\.pth"):
            train(recipe(pictures, "model.weights=nothing.pth", *settings), tmp_path / "run")
        lines = [line for line in capsys.readouterr().err.splitlines() if "learnt from" in line]
        total = 6 if shared == 6 else 2
        assert len(lines) == bool(shared)
        assert all(f".json: {shared} of {total} pictures are learnt from" in line for line in lines)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(pictures, tmp_path):
    out = tmp_path / "run"
    empty = json.loads((pictures / "train.json").read_text())
    empty["annotations"] = []
    other = json.loads((pictures / "val.json").read_text())
    other["categories"][0]["name"] = "comet"
    for name, content in (("empty", empty), ("other", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    images = f"data.images={pictures / 'images'}"
    for settings, words in (
        (["data.train=null"], "data.train"),
        ([f"data.train={tmp_path / 'missing.json'}"], "missing.json"),
        ([f"data.train={tmp_path / 'empty.json'}", images], "empty.json"),
        ([f"data.val={tmp_path / 'other.json'}", images], "other.json"),
        (["model.weights=nothing.pth"], "nothing.pth"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            train(recipe(pictures, *settings), out)
        assert "\n" not in str(caught.value)
        assert not out.exists()
    with pytest.raises(InputError, match="checkpoint"):
        train(recipe(pictures), out, resume=True)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="something already"):
        train(recipe(pictures), out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_the_demo_makes_a_table_and_a_page_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PICTURES", (4, 2))
    monkeypatch.setattr(demo, "MODEL", {"options": MODEL})
    out = tmp_path / "demo"
    (out / "toy").mkdir(parents=True)
    for name in ("demo.txt", "toy/labels.json"):
        (out / name).write_text("mine")
    with pytest.raises(InputError, match="something already"):
        demo.run(out, steps=1)
    assert (out / "toy/labels.json").read_text() == "mine"
    shutil.rmtree(out)
    demo.run(out, steps=1)
    shutil.rmtree(out / "toy")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/train.json").write_text("mine")
    (out / "toy").symlink_to(tmp_path / "elsewhere")
    demo.run(out, steps=1)  # an earlier demo is replaced, but nothing behind a link
    assert (tmp_path / "elsewhere/train.json").read_text() == "mine"
    page = (out / "report.html").read_text()
    assert "BRefine" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    table = (out / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["Mask R-CNN", "BRefine"]
    first, second = (Recipe.load(out / name / "recipe.yaml") for name in demo.METHODS)
    assert first.model.method != second.model.method
    assert (first.data, first.train) == (second.data, second.train)
    assert first.model.options == second.model.options
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="something already"):
        demo.run(out, steps=1)
    assert (out / "thesis.txt").read_text() == "mine"
    (tmp_path / "data/toy").mkdir(parents=True)  # a set of the user's, under a name of the demo's
    (tmp_path / "data/toy/train.json").write_text("mine")
    with pytest.raises(InputError, match="data: there is something already"):
        demo.run(tmp_path / "data", steps=1)
    assert (tmp_path / "data/toy/train.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("scores", "last", "best"),
    [
        ([0.1, 0.3, 0.2, 0.3], 11, 4),  # ends at the second that is no better, of equals the newest
        ([0.0, 0.0, 0.0, 0.3, 0.2, 0.1], 17, 4),  # nothing found yet is no reason to end
        ([math.nan] * 9, 26, 9),  # nothing to be found: nothing is known
    ],
)
def test_patience_ends_a_run_that_gets_no_better(
    pictures, tmp_path, monkeypatch, scores, last, best
):
    scores, steps = iter([*scores, 0.0]), []
    evaluate, step = training.evaluate, Learner.training_step

    def scored(*args, **options):
        report = evaluate(*args, **options)
        report.values["mask/AP"] = next(scores)
        return report

    def counted(self, *args):
        steps.append(self.global_step)
        return step(self, *args)

    monkeypatch.setattr(training, "evaluate", scored)
    monkeypatch.setattr(Learner, "training_step", counted)
    settings = ["train.steps=null", "train.epochs=9", "train.validate_every=1"]
    train(recipe(pictures, *settings, "train.patience=2"), tmp_path / "run")
    assert steps[-1] == last
    kept = weights.load(tmp_path / "run/best").segmenter.state_dict()
    ends = tmp_path / f"run/checkpoints/step_{3 * best:08}.ckpt"
    wanted = read(ends)["state_dict"]
    assert all(torch.equal(kept[key], wanted[f"model.{key}"]) for key in kept)
    for missing in ("data.val=null", "train.validate_every=null"):
        with pytest.raises(InputError, match=r"train\.patience: needs"):
            train(recipe(pictures, *settings, "train.patience=2", missing), tmp_path / "other")


def test_the_average_of_the_weights_is_what_is_kept(pictures, tmp_path, monkeypatch):
    seen, step = [], Learner.training_step

    def watched(self, *args):
        seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return step(self, *args)

    monkeypatch.setattr(Learner, "training_step", watched)
    frozen = "train.freeze=[trunk.body.*]"
    folder = train(recipe(pictures, "train.steps=5", "data.val=null", frozen), tmp_path / "plain")
    final = weights.load(folder).segmenter.state_dict()
    expected, states = {}, [*seen[1:], final]
    for n, state in enumerate(states):
        kept = min(0.3, (1 + n) / (10 + n)) if n else 0
        for key, value in state.items():
            expected[key] = kept * expected.get(key, 0) + (1 - kept) * value
    used = recipe(pictures, "train.steps=5", "data.val=null", frozen, "train.ema=0.3")
    kept = weights.load(train(used, tmp_path / "average")).segmenter.state_dict()
    assert all(torch.equal(a[k], b[k]) for a, b in zip(seen[:5], seen[5:], strict=True) for k in a)
    assert any(not torch.allclose(kept[key], final[key], atol=1e-6) for key in kept)
    still = 0
    for key, value in kept.items():
        assert torch.allclose(value.float(), torch.as_tensor(expected[key]).float(), atol=1e-6), key
        if all(torch.equal(state[key], final[key]) for state in states):
            assert torch.equal(value, final[key]), key
            still += 1
    assert still > 5


def test_a_recipe_or_a_table_of_somebody_s_own_is_not_replaced(pictures, tmp_path):
    for name in ("recipe.yaml", "metrics.csv"):
        (tmp_path / name).write_text("# mine")
        with pytest.raises(InputError, match="something already"):
            train(recipe(pictures), tmp_path)
        assert (tmp_path / name).read_text() == "# mine"
        (tmp_path / name).unlink()


def test_without_validation_there_are_curves_too(pictures, tmp_path):
    train(recipe(pictures, "data.val=null", "train.steps=2"), tmp_path / "run")
    assert "loss" in (tmp_path / "run/curves.html").read_text()


def test_previews_of_one_name_have_a_number(pictures, tmp_path, capsys):
    content = json.loads((pictures / "val.json").read_text())
    for name, image in zip("ab", content["images"], strict=True):
        (tmp_path / name).mkdir()
        shutil.copy(pictures / "images" / image["file_name"], tmp_path / name / "x.png")
        image["file_name"] = f"{name}/x.png"
    content["annotations"] = []
    (tmp_path / "val.json").write_text(json.dumps(content))
    settings = [f"data.val={tmp_path / 'val.json'}", f"data.val_images={tmp_path}"]
    settings += [f"data.images={pictures / 'images'}", "train.previews=2", "train.steps=2"]
    train(recipe(pictures, *settings), tmp_path / "run")
    drawn = sorted(path.name for path in (tmp_path / "run/previews").rglob("*.png"))
    assert drawn == ["x_1.png", "x_2.png"]
    assert "end: mask AP -, boundary AP -, box AP -" in capsys.readouterr().err  # of no object


def test_norms_that_learn_nothing_stay_in_evaluation_from_the_first_step_on():
    options = {**MODEL, "backbone": "test_efficientnet"}
    detector = {**MODEL["detector"], "norm": "batch"}
    model = create("mask_rcnn", 1, **{**options, "detector": detector})
    norms = [m for m in model.trunk.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(norm.training for norm in norms)
    Learner(
        model, TrainRecipe(steps=1, lr=0.1, freeze=("trunk.body.*",)), steps=1, epoch=1, devices=1
    )
    assert not any(norm.training for norm in norms)
    assert model.rpn.training


def test_a_run_can_be_followed(pictures, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ["train.validate_every=1", "train.previews=2", "train.loggers=[tensorboard]"]
    run = tmp_path / "run"
    train(recipe(pictures, *settings), run)
    with (run / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert [row["step"] for row in logged if row["val/mask/AP"]] == ["3", "4"]
    page = (run / "curves.html").read_text()
    for word in ("Parts of the loss", "boundary/AP", "<path", logged[0]["loss"][:4]):
        assert word in page
    assert "http" not in page.replace("http://www.w3.org", "")
    drawn = sorted((run / "previews").glob("*/*.png"))
    assert [path.parent.name for path in drawn] == ["step_00000003"] * 2 + ["step_00000004"] * 2
    assert Image.open(drawn[0]).size == (80, 64)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    (loss,) = events.Scalars("loss")
    assert loss.value == pytest.approx(float(logged[0]["loss"]))
    assert [event.step for event in events.Scalars("val/mask/AP")] == [3, 4]


def test_a_logger_that_is_not_installed_is_one_line(pictures, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("Required package `wandb` not found.")

    monkeypatch.setattr("brefine.logs.WandbLogger", missing)
    with pytest.raises(InputError, match=r"wandb is not installed: pip install 'brefine\[wandb\]'"):
        train(recipe(pictures, "train.loggers=[wandb]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mac_trains_on_its_cpu(pictures, tmp_path, monkeypatch):
    """Its GPU has no 64 bits, in which Rank & Sort counts."""
    for kind in (fabric.MPSAccelerator, pytorch.MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", staticmethod(lambda: True))
    train(recipe(pictures, "train.steps=1", "data.val=null", method="brefine"), tmp_path / "run")
    assert (tmp_path / "run/last").is_dir()


def test_a_run_that_failed_at_once_does_not_block_its_folder(pictures, tmp_path, monkeypatch):
    used = recipe(pictures, "train.steps=1", "data.val=null")

    def broken(*args):
        raise InputError("wrong")

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "training_step", broken)
        with pytest.raises(InputError, match="wrong"):
            train(used, tmp_path / "run")
    assert (tmp_path / "run/recipe.yaml").is_file()
    train(used, tmp_path / "run")
    with pytest.raises(InputError, match="something already"):  # now there is something to lose
        train(used, tmp_path / "run")
