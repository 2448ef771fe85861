"""What goes wrong in training is told with the pictures it went wrong in and what to do."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import brefine.train as training
from brefine import guards, weights
from brefine.checkpoints import newest
from brefine.data import toy
from brefine.data.coco import CocoSet
from brefine.data.loader import TrainSet
from brefine.guards import GradientGuard, explain_memory, explain_zero, find_missing, is_memory
from brefine.structures import InputError
from brefine.train import Learner, train
from test_train import recipe, rows


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.draw(folder, train=6, val=2, size=(64, 80), seed=3, progress=False)
    return folder


def poison(monkeypatch, *steps):
    """Let the loss of some steps be infinite; the names of the pictures that steps are made of."""
    shown, poisoned = [], []
    read, step = TrainSet.__getitem__, Learner.training_step

    def watched(self, key):
        shown.append(self.dataset.pictures[key[1]].file)
        return read(self, key)

    def wrong(self, batch, index):
        loss = self.model.loss

        def infinite(*args):
            named = loss(*args)
            return named | {"mask": named["mask"] * math.inf}

        if self.global_step in steps:
            poisoned.append((self.global_step, [str(file) for file in shown[-2:]], batch))
            self.model.loss = infinite
        try:
            return step(self, batch, index)
        finally:
            self.model.loss = loss

    monkeypatch.setattr(TrainSet, "__getitem__", watched)
    monkeypatch.setattr(Learner, "training_step", wrong)
    return poisoned


def test_a_loss_that_is_not_finite_names_and_saves_its_pictures(pictures, tmp_path, monkeypatch):
    poisoned = poison(monkeypatch, 4)
    with pytest.raises(InputError, match=r"step 4: the loss is not finite \(mask inf, ") as caught:
        train(recipe(pictures, "train.steps=6"), tmp_path / "run")
    ((_, files, (images, targets)),) = poisoned
    folder = tmp_path / "run/faults/step_00000004_process_0"
    assert f"in {', '.join(files)} (saved in {folder})" in str(caught.value)
    assert "train.on_fault=skip" in str(caught.value)
    about = json.loads((folder / "batch.json").read_text())
    assert [picture["file"] for picture in about["pictures"]] == files
    for i, picture in enumerate(about["pictures"]):
        height, width = images.sizes[i].tolist()
        assert Image.open(folder / f"{i}.png").size == (width, height)
        assert picture["labels"] == targets[i].labels.tolist()
        assert picture["boxes"] == targets[i].boxes.tolist()


def test_a_batch_can_be_skipped(pictures, tmp_path, monkeypatch, capsys):
    settings = ["train.on_fault=skip", "data.val=null", "train.steps=6"]
    poison(monkeypatch, 2, 4)
    folder = train(recipe(pictures, *settings), tmp_path / "run")
    said = capsys.readouterr().err
    for step in (2, 4):
        assert f"step {step}: the loss is not finite (mask inf, " in said
    assert said.count(": skipped") == 2
    state = weights.load(folder).segmenter.state_dict()
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_skipping_has_an_end(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "PATIENCE", 3)
    poison(monkeypatch, *range(1, 100))
    settings = ["train.on_fault=skip", "data.val=null", "train.steps=100"]
    with pytest.raises(InputError, match=r"step 4: .*4 steps in a row"):
        train(recipe(pictures, *settings), tmp_path / "run")


def test_rank_and_sort_that_diverged_names_its_pictures(pictures, tmp_path):
    used = recipe(pictures, "train.lr=1e30", "train.warmup_steps=0", method="brefine")
    with pytest.raises(InputError, match=r"step \d: .* in .*toy/images/train_.*train\.lr"):
        train(used, tmp_path / "run")


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_gradients_that_are_not_finite(pictures, tmp_path, monkeypatch, capsys, choice):
    step = Learner.training_step

    def steep(self, batch, index):
        loss = step(self, batch, index)
        if self.global_step == 1:
            loss.register_hook(lambda grad: grad * math.inf)
        return loss

    monkeypatch.setattr(Learner, "training_step", steep)
    used = recipe(pictures, f"train.on_fault={choice}", "data.val=null")
    if choice == "stop":
        with pytest.raises(InputError, match="step 1: gradients are not finite"):
            train(used, tmp_path / "run")
        return
    state = weights.load(train(used, tmp_path / "run")).segmenter.state_dict()
    assert (
        "step 1: gradients are not finite, though the loss is: skipped" in capsys.readouterr().err
    )
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_exploding_gradients_are_told_once_with_the_part(capsys):
    model = nn.ModuleDict({"trunk": nn.Linear(3, 3), "mask_head": nn.Linear(3, 3)})
    guard = GradientGuard()
    for step in range(60):
        for name, part in model.items():
            size = 500.0 if (name == "mask_head" and step in (40, 42)) else 1.0
            for parameter in part.parameters():
                parameter.grad = torch.full_like(parameter, size)
        norm = guard.look(model, step, None)
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert norm == pytest.approx(float(grads.norm()), rel=1e-5)
    (line,) = " ".join(capsys.readouterr().err.split()).split("step ")[1:]
    assert line.startswith(
        "40: gradients are 354 times as large as usual, most of all those of mask"
    )


def test_a_class_without_an_object_is_named(pictures, tmp_path, capsys):
    content = json.loads((pictures / "train.json").read_text())
    content["categories"].append({"id": 77, "name": "comet"})
    content["categories"].append({"id": 78, "name": "crowded"})
    content["annotations"].append({**content["annotations"][0], "id": 999, "iscrowd": 1})
    content["annotations"][-1]["category_id"] = 78
    (tmp_path / "train.json").write_text(json.dumps(content))
    missing = find_missing(CocoSet(tmp_path / "train.json", pictures / "images"))
    assert missing[-2:] == ["comet", "crowded"]
    paths = [f"data.train={tmp_path / 'train.json'}", f"data.images={pictures / 'images'}"]
    train(recipe(pictures, *paths, "data.val=null", "train.steps=1"), tmp_path / "run")
    assert "comet, crowded: it cannot be learnt" in " ".join(capsys.readouterr().err.split())


def test_causes_of_an_ap_of_zero(pictures):
    used = recipe(pictures)
    values = {"mask/AP50": 0.0, "box/AP50": 0.0}
    assert "nothing is detected at all: train.lr 0.01" in explain_zero(values, [], used)
    assert "there are 2 detections, none of them in place" in explain_zero(values, [{}, {}], used)
    assert "boxes are right and masks are not" in explain_zero(
        {**values, "box/AP50": 0.2}, [{}], used
    )
    for good in (0.1, math.nan):
        assert explain_zero({**values, "mask/AP50": good}, [], used) is None


def test_an_ap_of_zero_is_explained_after_the_warm_up(pictures, tmp_path, capsys):
    train(
        recipe(pictures, "train.lr=1e-9", "train.steps=2", "train.warmup_steps=5"), tmp_path / "a"
    )
    assert "AP50 is 0" not in capsys.readouterr().err
    train(
        recipe(pictures, "train.lr=1e-9", "train.steps=2", "train.warmup_steps=1"), tmp_path / "b"
    )
    assert "mask AP50 is 0 after the warm-up: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(pictures, tmp_path, monkeypatch, error):
    step, objects = Learner.training_step, []

    def hungry(self, batch, index):
        step(self, batch, index)
        objects.append(sum(len(target) for target in batch[1]))
        raise error

    monkeypatch.setattr(Learner, "training_step", hungry)
    with pytest.raises(InputError) as caught:
        train(recipe(pictures, "data.long_side=96"), tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(
        f"out of memory with 2 pictures a process of 64 x 96 with {objects[0]} objects: set "
        "train.batch_size=1 with train.accumulate=2"
    )
    assert "data.long_side=72 and data.short_side=[48]" in message


def test_memory_advice_follows_the_recipe(pictures):
    used = recipe(pictures, "data.crop=1024", "train.batch_size=8", "train.accumulate=3")
    line = explain_memory(used, (0, 0), 0)
    assert "8 pictures a process: set train.batch_size=4 with train.accumulate=6" in line
    assert "data.crop=768" in line
    assert "batch_size" not in explain_memory(recipe(pictures, "train.batch_size=1"), (0, 0), 0)
    assert not is_memory(RuntimeError("shapes differ"))
    assert not is_memory(ValueError("out of memory"))


def test_gradients_of_batches_add_up_to_those_of_a_larger_one(pictures, tmp_path):
    settings = ["train.steps=6", "data.val=null", "data.workers=0", "train.accumulate=2"]
    folder = tmp_path / "run"
    train(recipe(pictures, *settings, "train.epochs=null"), folder)
    (logged,) = rows(folder / "metrics.csv")
    assert logged["step"] == "0"
    content = newest(folder)[1]
    # Three batches an epoch make two steps: 6 steps are 3 epochs of 3 batches.
    assert content["global_step"] == 6
    assert content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 9


def summed(monkeypatch):
    """Let the gradient of a bias be 1 in every batch, see what it is in every step."""
    seen, create = [], training.create
    before = Learner.on_before_optimizer_step

    def made(*args, **kwargs):
        model = create(*args, **kwargs)
        model.loss = lambda *_: {"mask": model.rpn.objectness.bias.sum()}
        return model

    def watched(self, optimizer):
        seen.append(self.model.rpn.objectness.bias.grad.unique().tolist())
        before(self, optimizer)

    monkeypatch.setattr(training, "create", made)
    monkeypatch.setattr(Learner, "on_before_optimizer_step", watched)
    return seen


def test_a_step_is_the_mean_of_its_batches_however_many(pictures, tmp_path, monkeypatch):
    seen = summed(monkeypatch)
    used = recipe(pictures, "train.steps=4", "data.val=null", "train.accumulate=2")
    train(used, tmp_path / "run")
    assert seen == [[1.0]] * 4  # of two batches and of one, in turn


def test_a_skipped_batch_takes_no_other_of_its_step_along(pictures, tmp_path, monkeypatch):
    seen = summed(monkeypatch)
    poison(monkeypatch, 1, 2)  # the only batch of a step, and both of the next
    step, outcomes = Learner.training_step, []

    def watched(self, batch, index):
        outcomes.append(step(self, batch, index))
        return outcomes[-1]

    monkeypatch.setattr(Learner, "training_step", watched)
    settings = ["train.steps=4", "data.val=null", "train.on_fault=skip", "train.accumulate=2"]
    train(recipe(pictures, *settings), tmp_path / "run")
    # For None the scaler of 16 bits would leave out the whole step.
    assert None not in outcomes
    assert seen == [[1.0], [0.0], [0.0], [1.0]]


def test_averaging_weights_does_not_copy_the_data_set(pictures, tmp_path):
    data = CocoSet(pictures / "train.json")
    guard = guards.LossGuard(tmp_path, data, None, skip=False)
    model = nn.Linear(1, 1)
    learner = Learner(model, recipe(pictures).train, steps=4, epoch=3, devices=1, guard=guard)
    average = training.Average(0.9)
    average.setup(SimpleNamespace(), learner, "fit")
    copied = average._average_model.module
    assert copied.model is not model
    assert copied.guard.dataset is data
