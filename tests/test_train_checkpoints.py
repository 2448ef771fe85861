"""Checkpoint files: damaged, foreign, dangerous, old, of another run."""

import io
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from brefine import checkpoints, cli
from brefine.checkpoints import FORMAT, newest, read, step_of
from brefine.data import toy
from brefine.structures import InputError
from brefine.train import Learner, train
from test_train import recipe
from test_train_resume import LENGTH, SETTINGS, result, weights_of


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
