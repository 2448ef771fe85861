"""A run that is killed, stopped or out of room goes on, and ends as if nothing had happened."""

import csv
import io
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import brefine.train as training
from brefine import checkpoints, cli
from brefine.checkpoints import FORMAT, newest, read, step_of
from brefine.data import toy
from brefine.structures import InputError, Stopped
from brefine.train import Learner, train
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
    assert not list((run / "checkpoints").glob(".*"))


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
        assert [row["step"] for row in csv.DictReader(file)] == ["0"]


# ------------------------------------------------------------------------------- no room


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
    with pytest.raises(
        InputError, match=r"step_00000002\.ckpt: cannot write: (File exists|Not a d)"
    ):
        train(recipe(pictures, *SETTINGS), run, resume="auto")


# ------------------------------------------------------------------------------- checkpoint files


def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def change(path, **values):
    content = read(path)
    content.update(values)
    torch.save(content, path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_checkpoint_that_was_cut_short_gives_way_to_the_one_before(
    pictures, whole, tmp_path, capsys, share
):
    run = copy(whole, tmp_path)
    last = run / f"checkpoints/step_{LENGTH:08}.ckpt"
    last.write_bytes(last.read_bytes()[: int(share * last.stat().st_size)])
    found = newest(run)
    assert step_of(found[0]) == 6
    assert f"{last.name}: no checkpoint, or one that was cut short" in capsys.readouterr().err
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=f"{last.name}: .*there is none before that is whole"):
        train(recipe(pictures, *SETTINGS), run, resume=True)


def test_a_byte_that_changed_on_the_disk_is_noticed(whole, tmp_path):
    path = copy(whole, tmp_path) / f"checkpoints/step_{LENGTH:08}.ckpt"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(checkpoints.Damaged, match=path.name):
        read(path)


class Code:
    """What somebody would want us to run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(pictures, whole, tmp_path, capsys):
    run, victim = copy(whole, tmp_path), tmp_path / "victim"
    path = run / f"checkpoints/step_{LENGTH:08}.ckpt"
    plain = read(path)
    recipe(pictures, *SETTINGS).save(tmp_path / "recipe.yaml")
    for content in (
        Code(victim),
        plain | {"callbacks": Code(victim)},
        plain | {"x": [Code(victim)]},
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=f"{path.name}: no checkpoint of brefine.*not done"):
            newest(run)
        arguments = ["train", f"{tmp_path / 'recipe.yaml'}", "--out", f"{run}", "--resume"]
        assert cli.main(arguments) == 2
        assert "Traceback" not in capsys.readouterr().err
    path.write_bytes(pickle.dumps(Code(victim)))
    with pytest.raises(InputError, match=path.name):
        read(path)
    assert not victim.exists()
    torch.load(io_of(Code(victim)), weights_only=False)  # it would have
    assert victim.exists()


def io_of(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "content", [{"model": torch.zeros(2)}, [1, 2], torch.zeros(3), {"state_dict": {}, "epoch": 1}]
)
def test_a_file_of_somebody_else_is_refused_by_name(tmp_path, content):
    path = tmp_path / "checkpoints/step_00000001.ckpt"
    path.parent.mkdir()
    torch.save(content, path)
    with pytest.raises(InputError, match=f"{path.name}: no checkpoint of brefine"):
        newest(tmp_path)


def test_a_checkpoint_of_a_later_version_is_refused_by_name(whole, tmp_path):
    run = copy(whole, tmp_path)
    path = run / f"checkpoints/step_{LENGTH:08}.ckpt"
    change(path, brefine={"format": FORMAT + 1, "version": "9.9"})
    with pytest.raises(InputError, match=rf"{path.name}: written by brefine 9\.9.*upgrade"):
        newest(run)


def test_a_checkpoint_from_before_there_were_formats_is_gone_on_with(
    pictures, tmp_path, monkeypatch
):
    """What earlier versions left: one ``checkpoint.ckpt`` by Lightning's callback."""
    used, run = recipe(pictures, *SETTINGS, "train.ema=null"), tmp_path / "run"
    train(used, run)
    content = read(run / "checkpoints/step_00000006.ckpt")
    content.pop("brefine")
    content["callbacks"] = {"Evaluation": {"best": 0.25}, "ModelCheckpoint{'monitor': None}": {}}
    expected = weights_of(run / "last")
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "last")
    torch.save(content, run / "checkpoint.ckpt")
    seen, step = [], Learner.training_step

    def watched(self, *args):
        seen.append(self.global_step)
        return step(self, *args)

    monkeypatch.setattr(Learner, "training_step", watched)
    train(used, run, resume=True)
    assert seen == [6, 7]
    assert weights_of(run / "last") == expected


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.options.channels=8", "of another model: model.*use the run's own recipe"),
        ("model.method=brefine", "of another model: model.*use the run's own recipe"),
        ("train.lr=0.02", r"train\.lr was 0\.01 and is 0\.02"),
        ("train.seed=4", r"train\.seed was 0 and is 4"),
        ("train.batch_size=3", r"train\.batch_size was 2 and is 3"),
        ("data.flip=0.1", r"data\.flip was 0\.5 and is 0\.1"),
    ],
)
def test_another_run_does_not_go_on_from_a_checkpoint(pictures, whole, tmp_path, setting, words):
    run = copy(whole, tmp_path)
    with pytest.raises(InputError, match=rf"step_0000000{LENGTH}\.ckpt: {words}") as caught:
        train(recipe(pictures, *SETTINGS, setting), run, resume=True)
    assert "\n" not in str(caught.value)
    assert result(run) == result(whole)


def test_a_run_can_be_made_longer(pictures, whole, tmp_path, capsys):
    run = copy(whole, tmp_path)
    longer = recipe(pictures, *SETTINGS, f"train.steps={LENGTH + 2}")
    train(longer, run, resume=True)
    assert f"train.steps: {LENGTH} before, {LENGTH + 2} from now on" in capsys.readouterr().err
    train(longer, tmp_path / "other")
    assert weights_of(run / "last") == weights_of(tmp_path / "other/last")


def test_auto_does_not_start_in_a_folder_with_something_else(pictures, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").touch()
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="something already"):
        train(recipe(pictures, *SETTINGS), run, resume="auto")
    assert (run / "thesis.txt").read_text() == "mine"
