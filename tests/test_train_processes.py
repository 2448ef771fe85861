"""Processes of a run: loader workers come, go and die; the same bits with any number of them."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from brefine import cli, weights
from brefine.data import toy
from brefine.structures import InputError
from brefine.train import Learner, train
from test_train import recipe

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.draw(folder, train=12, val=2, size=(64, 80), seed=3, progress=False)
    return folder


def start(work):
    """Run a function that returns an exit code in a process that leads its own group."""

    def lead():
        os.setpgid(0, 0)
        os._exit(work() or 0)

    process = multiprocessing.get_context("fork").Process(target=lead)
    process.start()
    return process


def members(group):
    """Processes of a group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.mark.parametrize("everybody", [True, False])
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks at shared memory")
def test_sigterm_in_an_epoch_with_two_workers_leaves_nothing_behind(pictures, tmp_path, everybody):
    run, file = tmp_path / "run", tmp_path / "recipe.yaml"
    settings = ["data.workers=2", "train.steps=500", "train.checkpoint_every=4", "data.val=null"]
    recipe(pictures, *settings).save(file)
    before = set(os.listdir("/dev/shm"))
    process = start(lambda: cli.main(["train", str(file), "--out", str(run)]))
    wait(lambda: any(run.glob("checkpoints/step_*")) and len(members(process.pid)) == 3)
    if everybody:  # as a scheduler does
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75
    wait(lambda: not members(process.pid), 1)
    wait(lambda: set(os.listdir("/dev/shm")) <= before, 5)  # others come and go
    assert not (run / "last").exists()
    last = max(run.glob("checkpoints/step_*")).stem.partition("_")[2]
    train(recipe(pictures, *settings, f"train.steps={int(last) + 1}"), run, resume=True)


def test_workers_of_a_killed_run_end_by_themselves(pictures, tmp_path):
    used = recipe(pictures, "data.workers=2", "train.steps=500", "data.val=null")
    before = set(os.listdir("/dev/shm"))
    process = start(lambda: train(used, tmp_path / "run") and 0)
    wait(lambda: any((tmp_path / "run").glob("checkpoints/step_*")))
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    wait(lambda: not members(process.pid), 15)  # they look after their parent every 5 seconds
    wait(lambda: set(os.listdir("/dev/shm")) <= before, 5)  # others come and go


def test_a_worker_that_is_killed_ends_the_run_in_one_line(pictures, tmp_path, monkeypatch):
    step = Learner.training_step

    def killing(self, batch, index):
        if self.global_step == 2:
            child = multiprocessing.active_children()[0]
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        return step(self, batch, index)

    monkeypatch.setattr(Learner, "training_step", killing)
    used = recipe(pictures, "data.workers=2", "train.steps=500", "data.val=null")
    with pytest.raises(
        InputError, match=r"a loader process \(\d+\) .*(Killed|unexpectedly).*data\.workers"
    ):
        train(used, tmp_path / "run")


def test_the_same_seed_gives_the_same_bits_with_any_number_of_workers(pictures, tmp_path):
    states = []
    for name, workers in (("a", 0), ("b", 2), ("c", 0)):
        settings = [f"data.workers={workers}", "data.copy_paste=0.5", "train.steps=8"]
        random = ["model.options.detector.mask_rois=2", "train.deterministic=true"]
        used = recipe(pictures, *settings, *random, "data.val=null", method="brefine")
        states.append(weights.load(train(used, tmp_path / name)).segmenter.state_dict())
    first, *others = states
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert not torch.are_deterministic_algorithms_enabled()
