"""A run that is killed, stopped or out of room goes on, and ends as if nothing had happened."""

import csv
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch
from safetensors import safe_open

import brefine.train as training
from brefine import checkpoints, cli
from brefine.checkpoints import step_of
from brefine.data import toy
from brefine.structures import InputError, Stopped
from brefine.train import DESCRIPTION, Learner, train
from test_train import recipe

LENGTH = 8  # steps
#: three steps an epoch; evaluations of steps 3 and 6, every second step a checkpoint
SETTINGS = [
    f"train.steps={LENGTH}",
    "train.validate_every=1",
    "train.checkpoint_every=2",
    "train.ema=0.5",
    "train.milestones=5",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.draw(folder, train=6, val=2, size=(64, 80), seed=3, progress=False)
    return folder


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(recipe(pictures, *SETTINGS), run)
    return run


def result(run):
    """Everything in a run folder that tells how the run went."""
    files = {name: (run / name).read_bytes() for name in ("metrics.csv", "predictions.json")}
    for name in ("last", "best"):
        files[f"{name}/README.md"] = (run / name / "README.md").read_bytes()
        files |= {f"{name} {key}": bits for key, bits in weights_of(run / name).items()}
    return files


def weights_of(folder):
    """The bits of a model folder's tensors, and what its header says, which has no fixed order."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        bits = {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
        return bits | file.metadata()


def steps(run):
    return [step_of(path) for path in sorted((run / "checkpoints").glob("step_*"))]


def in_a_process(work):
    """Run a function in a process of its own; its exit code, negative if a signal ended it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(name, monkeypatch):
    """Let the process be killed by SIGKILL in a certain place."""
    kind, _, number = name.partition(" ")
    calls = iter(range(int(number), -1, -1))
    if kind == "step":
        step = Learner.training_step

        def dying(self, *args):
            return step(self, *args) if next(calls) else die()

        monkeypatch.setattr(Learner, "training_step", dying)
    elif kind == "write":
        write = torch.save

        def dying(content, file):
            if next(calls):
                return write(content, file)
            write(content, file)
            file.truncate(file.tell() // 2)
            file.flush()
            die()

        monkeypatch.setattr(torch, "save", dying)
    elif kind == "evaluation":
        evaluate = training.evaluate
        monkeypatch.setattr(
            training, "evaluate", lambda *a, **k: evaluate(*a, **k) if next(calls) else die()
        )
    elif kind == "model":
        save = training.weights.save

        def dying(folder, *args, **kwargs):
            if not next(calls):
                monkeypatch.setattr(os, "replace", moving)
            save(folder, *args, **kwargs)

        def moving(source, target, replace=os.replace):
            replace(source, target)
            if target.name.endswith(".old") or target.name == "last":
                die()

        monkeypatch.setattr(training.weights, "save", dying)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    pictures, whole, tmp_path, monkeypatch
):
    used, run = recipe(pictures, *SETTINGS), tmp_path / "run"
    places = [
        "write 0",  # the very first checkpoint is half written
        "step 3",  # after the evaluation of step 3: the first step of the second epoch
        "evaluation 0",  # which comes again
        "write 0",  # of step 4
        "model 0",  # the old best/ has stepped aside, the new one is not there yet
        "step 2",  # in the middle of an epoch
        "evaluation 0",  # of step 6
        "write 0",  # of step 8, the last
        "model 0",  # last/ is there, and the rest is missing
    ]
    for place in places:

        def work(place=place):
            with monkeypatch.context() as patch:
                kill_in(place, patch)
                train(used, run, resume="auto")

        assert in_a_process(work) == -signal.SIGKILL, place
    assert in_a_process(lambda: train(used, run, resume="auto")) == 0
    assert result(run) == result(whole)
    assert not [path for path in run.rglob(".*") if path.parent.name in ("run", "checkpoints")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_says_so(
    pictures, whole, tmp_path, monkeypatch, capsys, number
):
    step = Learner.training_step

    def signalled(self, batch, index):
        if self.global_step == 4:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return step(self, batch, index)

    used, run = recipe(pictures, *SETTINGS), tmp_path / "run"
    used.save(tmp_path / "recipe.yaml")
    handlers = [signal.getsignal(each) for each in checkpoints.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "training_step", signalled)
        assert cli.main(["train", f"{tmp_path / 'recipe.yaml'}", "--out", str(run)]) == 75
    assert [signal.getsignal(each) for each in checkpoints.SIGNALS] == handlers
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"stopped by {number.name} after step 5: --resume goes on"
    assert steps(run)[-1] == 5
    assert not (run / "last").exists()
    arguments = ["train", f"{tmp_path / 'recipe.yaml'}", "--out", str(run), "--resume"]
    assert cli.main(arguments) == 0
    assert result(run) == result(whole)


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(
    pictures, whole, tmp_path, monkeypatch
):
    used, run, evaluate = recipe(pictures, *SETTINGS), tmp_path / "run", training.evaluate
    # Resumed, a run begins with the evaluation it stopped in; the last one is after training.
    for before, step in ((0, 3), (0, 3), (2, LENGTH)):
        calls = iter(range(before, -1, -1))

        def signalled(*args, calls=calls, **kwargs):
            if next(calls):
                return evaluate(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            raise AssertionError("nobody listened")

        with monkeypatch.context() as patch:
            patch.setattr(training, "evaluate", signalled)
            with pytest.raises(Stopped, match=f"SIGTERM after step {step}:"):
                train(used, run, resume="auto")
        assert steps(run)[-1] == step
    train(used, run, resume=True)
    assert result(run) == result(whole)


def test_the_second_ctrl_c_does_not_wait(pictures, tmp_path, monkeypatch):
    def pressed(self, batch, index):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(Learner, "training_step", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(pictures, *SETTINGS), tmp_path / "run")


def test_the_last_checkpoints_and_the_best_are_kept(pictures, tmp_path, monkeypatch):
    scores, evaluate = iter([0.3, 0.1, 0.2]), training.evaluate

    def scored(*args, **options):
        report = evaluate(*args, **options)
        report.values["mask/AP"] = next(scores)
        return report

    monkeypatch.setattr(training, "evaluate", scored)
    train(recipe(pictures, *SETTINGS, "train.keep_checkpoints=1"), tmp_path / "run")
    assert steps(tmp_path / "run") == [3, LENGTH]


def test_the_table_goes_on_where_the_checkpoint_is(whole):
    with (whole / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "3", "6", "8"]


# ------------------------------------------------------------------------------- no room


def test_torch_ends_a_file_on_a_full_disk_with_an_error_of_its_own(tmp_path, monkeypatch):
    def full(content, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"a\.ckpt: cannot write: No space left on device"):
        checkpoints.write({}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    pictures, whole, tmp_path, monkeypatch
):
    """The limit of a file's size stands for the disk: writing beyond it is an OSError, too."""
    used, run, write = recipe(pictures, *SETTINGS), tmp_path / "run", torch.save
    calls, limits = iter(range(9)), resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(content, file):
        if next(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        write(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        try:
            with pytest.raises(InputError, match=r"step_00000004\.ckpt: cannot write: File too l"):
                train(used, run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_00000002.ckpt",
        "step_00000003.ckpt",
    ]
    train(used, run, resume=True)
    assert result(run) == result(whole)


def test_a_folder_that_cannot_be_written_to_is_one_line(pictures, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "run").write_text("in the way")
    for resume in (False, "auto"):
        with pytest.raises(InputError, match="something already"):
            train(recipe(pictures, *SETTINGS), run, resume=resume)
    run.unlink()
    run.mkdir()
    (run / "checkpoints").write_text("in the way")
    for name in DESCRIPTION:  # of a run that has only begun
        (run / name).touch()
    with pytest.raises(
        InputError, match=r"step_00000002\.ckpt: cannot write: (File exists|Not a d)"
    ):
        train(recipe(pictures, *SETTINGS), run, resume="auto")
