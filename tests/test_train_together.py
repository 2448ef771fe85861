"""Processes that train one model: what they compute together, and what happens when one goes."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed
from torch.distributed import TCPStore

from brefine import processes, weights
from brefine.checkpoints import newest, read
from brefine.data import toy
from brefine.data.coco import CocoSet
from brefine.evaluate import evaluate
from brefine.methods import create
from brefine.parts import boxes, together
from brefine.predict import Predictor
from brefine.structures import Bitmaps, Images, InputError, Instances, Stopped
from brefine.train import Learner, train
from test_train import MODEL, recipe

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.draw(folder, train=9, val=3, size=(64, 80), seed=3, progress=False)
    return folder


def fork(work, count=2):
    """Start processes that run ``work(rank)``."""
    started = []
    for rank in range(count):
        process = multiprocessing.get_context("fork").Process(target=work, args=(rank,))
        process.start()
        started.append(process)
    return started


def join(started, seconds=60):
    end = time.monotonic() + seconds
    for process in started:
        process.join(max(0.1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            raise AssertionError("a process hangs")
    return [process.exitcode for process in started]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ------------------------------------------------------------------------------- gradients


def batch(numbers):
    """Pictures of one size with one, two or three rectangles."""
    pixels, targets = [], []
    for number in numbers:
        random = torch.Generator().manual_seed(number)
        pixels.append(torch.rand(3, 64, 96, generator=random) * 255)
        count = 1 + number % 3
        corner = torch.rand(count, 2, generator=random) * torch.tensor([50.0, 25.0])
        side = 14 + torch.rand(count, 2, generator=random) * 22
        boxes = torch.cat([corner, corner + side], 1).round()
        masks = torch.zeros(count, 64, 96, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.arange(count) % 3
        targets.append(Instances((64, 96), boxes, labels, masks=Bitmaps.of(masks)))
    return Images.stack(pixels), targets


def gradients(method, ranking, numbers, parts=None):
    """Gradients by name of a model's losses, or of some of them, for some pictures."""
    torch.manual_seed(5)
    detector = {**MODEL["detector"], "mask_rois": None, "rpn_samples": None, "roi_samples": None}
    options = {**MODEL, "detector": detector, "ranking": ranking}
    model = create(method, 3, **options).double()
    named = model.loss(*batch(numbers))
    used = [v for k, v in named.items() if not k.startswith("raw_") and (not parts or k in parts)]
    torch.stack(used).sum().backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.named_parameters()
    }


def difference(mine, whole):
    """Largest difference of any part's gradients, relative to the part's largest."""
    return max(
        float((mine[k] - whole[k]).abs().max() / whole[k].abs().max().clamp(min=1e-12))
        for k in whole
        if whole[k].abs().max() > 1e-9
    )


def two(folder, method, ranking, on, parts=None):
    """What two processes with half of the pictures each have in common in the end."""

    def work(rank):
        torch.set_num_threads(1)
        store = f"file://{folder / 'store'}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        with together.switched(on):
            mine = gradients(method, ranking, [[1, 2], [3, 5]][rank], parts)
        for value in mine.values():  # what DDP does
            distributed.all_reduce(value)
            value /= 2
        if rank == 0:
            torch.save(mine, folder / "gradients.pt")
        distributed.destroy_process_group()

    assert join(fork(work)) == [0, 0]
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("method", ["mask_rcnn", "brefine", "mask_scoring", "cascade", "bmask"])
@pytest.mark.parametrize("ranking", [False, True])
def test_together_two_processes_have_the_gradients_of_one_with_twice_the_batch(
    tmp_path, method, ranking
):
    whole = gradients(method, ranking, [1, 2, 3, 5])
    assert difference(two(tmp_path, method, ranking, True), whole) < 1e-5


def test_apart_that_holds_for_unranked_losses_of_equal_counts_alone(tmp_path, monkeypatch):
    """Every picture gives as many anchors and RoIs, but not as many positives for the masks."""

    def always_8(label, samples, share):
        return torch.cat([(label > 0).nonzero()[:, 0], (label == 0).nonzero()[:, 0]])[:8]

    monkeypatch.setattr(boxes, "sample", always_8)
    for name, ranking, parts, same in (
        ("a", False, ["rpn", "rpn_box", "cls", "box"], True),
        ("b", False, ["mask"], False),
        ("c", True, ["rpn_rank"], False),
    ):
        (tmp_path / name).mkdir()
        whole = gradients("brefine", ranking, [1, 2, 3, 5], parts)
        apart = difference(two(tmp_path / name, "brefine", ranking, False, parts), whole)
        assert (apart < 1e-5) == same, (name, apart)


def test_a_batch_that_one_process_cannot_use_is_skipped_by_both(pictures, tmp_path, monkeypatch):
    """Neither their weights nor AdamW's averages move in that step, and the next one goes on."""
    used = recipe(
        pictures,
        "train.on_fault=skip",
        "train.optimizer=adamw",
        "data.val=null",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=4",
    )
    step = Learner.training_step

    def wrong(self, batch, index):
        loss = self.model.loss
        if self.global_step == 2 and self.global_rank == 1:
            self.model.loss = lambda *args: {"mask": loss(*args)["mask"] * float("inf")}
        try:
            return step(self, batch, index)
        finally:
            self.model.loss = loss

    monkeypatch.setattr(Learner, "training_step", wrong)
    assert join(machines(used, tmp_path / "run")) == [0, 0]
    folder = tmp_path / "run/checkpoints"
    before, skipped, after = (read(folder / f"step_{number:08d}.ckpt") for number in (2, 3, 4))
    name = "model.rpn.objectness.weight"
    assert torch.equal(before["state_dict"][name], skipped["state_dict"][name])
    assert not torch.equal(before["state_dict"][name], after["state_dict"][name])
    averages, same = (each["optimizer_states"][0]["state"] for each in (before, skipped))
    assert averages
    assert all(torch.equal(a["exp_avg"], same[key]["exp_avg"]) for key, a in averages.items())


# ------------------------------------------------------------------------------- whole runs


def machines(used, run, resume=False, before=lambda rank: None):
    """Two processes that train as two machines of a run would; standard error goes to files."""
    port, base = free_port(), run.parent

    def work(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK=str(rank))
        with (base / f"{rank}.log").open("a", buffering=1) as sys.stderr:
            before(rank)
            code = 0
            try:
                train(used, run, nodes=2, resume=resume)
            except (InputError, Stopped) as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                code = 75 if isinstance(error, Stopped) else 2
            except SystemExit as end:
                code = end.code
        os._exit(code)

    return fork(work)


def said(run, rank):
    return (run.parent / f"{rank}.log").read_text().strip().splitlines()[-1]


def test_two_machines_train_one_model_and_go_on_with_it(pictures, tmp_path):
    settings = [
        "train.validate_every=1",
        "train.checkpoint_every=1",
        "train.rank_together=true",
        # each process counts the statistics of its own pictures
        "model.options.backbone=test_efficientnet",
        "model.options.detector.norm=batch",
    ]
    used = recipe(pictures, *settings, "train.steps=5", method="brefine")
    whole, run = tmp_path / "whole/run", tmp_path / "parts/run"
    whole.parent.mkdir()
    run.parent.mkdir()
    assert join(machines(used, whole)) == [0, 0]
    assert newest(whole)[1]["brefine"]["batches"] == 3  # nine pictures, two by two on two

    def stopping(rank):
        step = Learner.training_step

        def signalled(self, *args):
            if rank == 1 and self.global_step == 2:  # one of them hears it, both stop
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            return step(self, *args)

        Learner.training_step = signalled

    assert join(machines(used, run, before=stopping)) == [75, 0]
    assert "after step 3" in said(run, 0)
    assert join(machines(used, run, resume=True)) == [0, 0]
    first, second = (weights.load(each / "last").segmenter.state_dict() for each in (whole, run))
    assert all(torch.equal(first[key], second[key]) for key in first)
    # Three pictures on two processes: the report of one process, to the last digit.
    model = weights.load(whole / "last")
    predictor = Predictor(model.segmenter, model.categories, short_side=64, long_side=80)
    alone = evaluate(predictor, CocoSet(pictures / "val.json"), progress=False)
    assert json.loads((whole / "evaluation.json").read_text()) == json.loads(
        json.dumps(alone.as_dict())
    )
    with pytest.raises(InputError, match="made with 2 processes, now there are 1"):
        train(used, run, resume=True)


def test_the_first_process_may_be_the_first_to_end():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pulse = processes.Pulse()
    pulse.rank, pulse.world = 1, 2
    pulse.store = TCPStore("127.0.0.1", store.port, is_master=False)
    del store

    def insist():
        for _ in range(500):  # the first is sent before anybody knows
            pulse.store.set("key", "")
            time.sleep(0.01)

    with pytest.raises(RuntimeError):
        insist()
    pulse.on_fit_end()  # has nobody to say goodbye to
    assert pulse.ended.is_set()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_is_named(pictures, tmp_path, victim):
    run = tmp_path / "run"

    def quick(rank):
        processes.BEAT = 0.3

    used = recipe(pictures, "train.steps=5000", "train.checkpoint_every=1", "data.val=null")
    started = machines(used, run, before=quick)
    while not has_saved(run):
        time.sleep(0.1)
    started[victim].kill()
    codes = join(started, 30)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 75
    name = rf"process {victim} \(.*, pid {started[victim].pid}\) has given no sign of life"
    assert re.search(name, said(run, 1 - victim))
    assert newest(run)


def has_saved(run):
    return any(run.glob("checkpoints/step_*"))


def test_a_process_that_hangs_ends_the_run(pictures, tmp_path):
    run = tmp_path / "run"

    def quick(rank):
        processes.BEAT, processes.SILENCE, processes.LINGER = 0.2, 4.0, 0.5

    used = recipe(pictures, "train.steps=5000", "train.checkpoint_every=1", "data.val=null")
    started = machines(used, run, before=quick)
    while not has_saved(run):
        time.sleep(0.1)
    os.kill(started[1].pid, signal.SIGSTOP)
    started[0].join(30)
    assert started[0].exitcode == 75
    assert f"pid {started[1].pid}) has given no sign of life" in said(run, 0)
    started[1].kill()
    started[1].join()


def test_a_process_that_fails_tells_the_others_why(pictures, tmp_path):
    run = tmp_path / "run"

    def failing(rank):
        processes.BEAT = 0.3
        step = Learner.training_step

        def broken(self, *args):
            if rank == 1 and self.global_step == 1:
                raise InputError("toy.png: no picture")
            return step(self, *args)

        Learner.training_step = broken

    used = recipe(pictures, "train.steps=5000", "data.val=null")
    assert join(machines(used, run, before=failing)) == [75, 2]
    assert said(run, 1) == "InputError: toy.png: no picture"
    assert "failed: InputError: toy.png: no picture; this run stopped" in said(run, 0)


def test_machines_that_never_come_are_missed(pictures, tmp_path):
    run = tmp_path / "run"

    def impatient(rank):
        processes.MEETING = timedelta(seconds=1)
        if rank == 1:
            os._exit(0)

    started = machines(recipe(pictures, "train.steps=2"), run, before=impatient)
    assert join(started) == [2, 0]
    assert re.fullmatch(
        r"InputError: the processes of this run did not come together at 127.0.0.1:\d+ \(Timed out "
        r".*\): start the same command on every machine within 0:00:01 hours, with the same "
        "address and a free port",
        said(run, 0),
    )
    assert not (run / "last").exists()


def test_a_port_in_use_is_named(pictures, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setitem(globals(), "free_port", lambda: taken.getsockname()[1])

        def first(rank):
            if rank == 1:
                os._exit(0)

        used = recipe(pictures, "train.steps=2")
        assert join(machines(used, tmp_path / "run", before=first)) == [2, 0]
        assert re.search(r"together at 127.0.0.1:\d+ \(.*in use.*\): ", said(tmp_path / "run", 0))


def test_launchers_say_how_many_processes_there_are(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes.is_first()
    assert processes.count(None, None) == (max(1, torch.cuda.device_count()), 1)
    assert processes.count(3, 2) == (3, 2)
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    assert processes.count(None, None) == processes.count(4, 2) == (4, 2)
    with pytest.raises(InputError, match="--nodes 3: the launcher started 2"):
        processes.count(None, 3)
    monkeypatch.setenv("RANK", "5")
    assert not processes.is_first()
