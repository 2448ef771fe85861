"""Checkpoints: what a run needs to go on as if it had never stopped.

They lie in ``RUN/checkpoints`` by step, each written aside, flushed to the disk and then moved, so
that a file with that name is whole whatever happens. They hold weights, their average, the states
of optimiser, schedule and scaler, and the place in the epoch. No random state: what is random in
a batch follows from the seed, the epoch and the batch.

Nothing but tensors, numbers and text is ever read from them: no file can make us run its code.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from brefine import processes
from brefine.files import replacing
from brefine.progress import console
from brefine.recipe import Recipe
from brefine.structures import InputError, Stopped

if TYPE_CHECKING:
    from brefine.train import Evaluation

FORMAT = 1  # of what we add to Lightning's own content
FOLDER = "checkpoints"

#: signals that end the step, save and stop; schedulers can be told to send the last one
SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM))

#: keys of a recipe that may change when a run goes on: it stays the same run
FREE = (
    "model.weights",
    *(f"data.{key}" for key in ("train", "val", "images", "val_images", "semantic", "workers")),
    *(
        f"train.{key}"
        for key in (
            "steps",
            "epochs",
            "validate_every",
            "patience",
            "checkpoint_every",
            "keep_checkpoints",
            "loggers",
            "previews",
            "on_fault",
        )
    ),
)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handlers of signals back in the end, whoever has changed them."""
    first = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = {number: signal.getsignal(number) for number in SIGNALS if first}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Damaged(InputError):
    """A checkpoint that was cut short or changed on the disk."""


def describe(recipe: Recipe, *, batches: int, processes: int) -> dict[str, Any]:
    """What a checkpoint says of its run.

    Args:
        recipe: of the run.
        batches: that each process has in an epoch.
        processes: that share an epoch.
    """
    return {
        "format": FORMAT,
        "version": version("brefine"),
        "recipe": recipe.model_dump(mode="json"),
        "batches": batches,
        "processes": processes,
    }


def write(checkpoint: Mapping[str, Any], path: Path | str) -> None:
    """Write a checkpoint; whatever is at ``path`` stays until the new file is on the disk.

    Raises:
        InputError: the disk is full or the folder cannot be written to.
    """
    try:
        with replacing(path) as aside, aside.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own end of the file, which fails, too
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())  # a name that outlives a power cut must not outlive its content
    except InputError as error:
        raise InputError(
            f"{error}: earlier checkpoints are whole; --resume goes on there"
        ) from None


def read(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint into memory, running nothing.

    Raises:
        Damaged: it was cut short or changed.
        InputError: it is something else, or of a later version; names the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise Damaged(f"{path}: damaged: {broken} in it is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: no checkpoint of brefine: it asks for code to be run, which was not done"
        ) from None
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError):
        raise Damaged(f"{path}: no checkpoint, or one that was cut short") from None
    keys = {"state_dict", "optimizer_states", "loops", "global_step"}
    if not isinstance(content, dict) or not keys <= content.keys():
        raise InputError(f"{path}: no checkpoint of brefine: name the run folder of a training")
    about = content.get("brefine", {"format": 0})  # 0: before checkpoints said of which run
    if about["format"] > FORMAT:
        raise InputError(
            f"{path}: written by brefine {about['version']}, whose format {about['format']} this "
            f"version does not know: upgrade to go on with it"
        )
    return content


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run folder and what it holds; None if there never was one.

    Raises:
        InputError: none is whole, or the newest is no checkpoint of ours.
    """
    paths = sorted((run / FOLDER).glob("step_*.ckpt"), key=step_of, reverse=True)
    paths += [path for path in [run / "checkpoint.ckpt"] if path.is_file()]  # the only one, once
    fault = None
    for path in paths:
        try:
            return path, read(path)
        except Damaged as error:
            fault = fault or error
            console.print(f"{error}: looking for the one before", soft_wrap=True, markup=False)
    if fault:
        raise InputError(f"{fault}; and there is none before that is whole: start a new run")
    return None


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    found = re.search(r"step_(\d+)", path.name)
    return int(found[1]) if found else -1


def check(content: Mapping[str, Any], path: Path, about: Mapping[str, Any], state: Any) -> None:
    """Make sure that a run can go on from a checkpoint as if it had not stopped.

    Args:
        content: of the checkpoint.
        path: its name.
        about: `describe` of the run.
        state: the learner's state dict.

    Raises:
        InputError: another model, recipe, set of pictures or number of processes.
    """
    saved: dict[str, Tensor] = content["state_dict"]
    for key in sorted(saved.keys() ^ state.keys()):
        where = "the checkpoint alone" if key in saved else "the recipe's model alone"
        raise InputError(f"{path}: of another model: {key} is in {where}: use the run's own recipe")
    for key, value in saved.items():
        if value.shape != state[key].shape:
            raise InputError(
                f"{path}: of another model: {key} is {list(value.shape)} there and "
                f"{list(state[key].shape)} in the recipe's: use the run's own recipe"
            )
    earlier = content.get("brefine")
    if earlier is None:
        return
    recipe = Recipe.parse(earlier["recipe"], str(path)).model_dump(mode="json")
    for key, (old, new) in changes(recipe, about["recipe"]).items():
        if not key.startswith(FREE):
            raise InputError(
                f"{path}: {key} was {old} and is {new}: a resumed run must be the same run: put "
                "it back, or start a new one with model.weights"
            )
        console.print(f"  {key}: {old} before, {new} from now on", soft_wrap=True, markup=False)
    for key, name in (("processes", "processes"), ("batches", "batches an epoch and process")):
        if earlier[key] != about[key]:
            raise InputError(
                f"{path}: made with {earlier[key]} {name}, now there are {about[key]}: the place "
                "in the epoch would be lost: use as many, or start a new run with model.weights"
            )


def recall(content: Mapping[str, Any], path: Path, recipe: Recipe) -> Recipe:
    """A recipe with the ``train.batch_size`` that the run of a checkpoint had, in place of auto.

    Args:
        content: of the checkpoint.
        path: its name.
        recipe: of the run that goes on.

    Raises:
        InputError: the checkpoint is of an early version and does not say.
    """
    earlier = content.get("brefine")
    if earlier is None:
        raise InputError(f"{path}: does not say what train.batch_size was: give the number")
    return recipe.with_settings([f"train.batch_size={earlier['recipe']['train']['batch_size']}"])


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values of two recipes that differ, ``(was, now)`` by path, such as ``train.lr``.

    Args:
        was: a recipe's plain values.
        now: another's.
    """
    old, new = _flat(was), _flat(now)
    pairs = {key: (old.get(key), new.get(key)) for key in sorted({*old, *new})}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class Store(TorchCheckpointIO):
    """How Lightning reads and writes checkpoints: as `read` and `write` do."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """`write`."""
        write(checkpoint, path)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """`read`."""
        return read(path)


class Checkpoints(L.Callback):
    """Writes checkpoints: every so often, before evaluations, at the end, and upon signals.

    Args:
        run: the run folder.
        every: steps from one to the next.
        keep: so many of the last, and that of the best evaluation.
        about: `describe` of the run.
        evaluation: whose turn it is after this callback.
    """

    def __init__(
        self, run: Path, *, every: int, keep: int, about: dict[str, Any], evaluation: Evaluation
    ) -> None:
        self.folder, self.every, self.keep, self.about = run / FOLDER, every, keep, about
        self.evaluation = evaluation
        self.step = 0  # that was looked at last
        self.heard: signal.Signals | None = None

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Remove what killed processes left half written."""
        if trainer.is_global_zero:
            for left in [*self.folder.glob(".*"), *self.folder.parent.glob(".*")]:
                if re.fullmatch(r"\..+\.\d+(\.old)?", left.name):  # see `files.replacing`
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Listen to signals, in place of Lightning, which would stop in the middle of things."""
        self.step = trainer.global_step
        self.listen()

    def on_fit_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Lightning has put the handlers back; the last evaluation follows."""
        self.listen()

    def on_save_checkpoint(self, *arguments: Any) -> None:
        """Say of which run the checkpoint is."""
        arguments[2]["brefine"] = self.about

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """After a step of the optimiser: save if it is time, and stop if a signal came."""
        step = trainer.global_step
        if step == self.step:  # gradients are still being added up
            return
        self.step = step
        stop = self.heard is not None
        if trainer.world_size > 1:  # they must all stop at the same step
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        due = step % self.every == 0 or step >= trainer.max_steps or self.evaluation.is_due(trainer)
        if stop or due:
            self.save(trainer)
        if stop:
            self.heard = self.heard or signal.SIGTERM
            trainer.should_stop = self.evaluation.stopping = True

    def save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint of the present step, and remove those that are too many."""
        trainer.save_checkpoint(self.path(trainer.global_step))
        if trainer.is_global_zero:
            best = self.path(self.evaluation.best_step)
            paths = sorted(self.folder.glob("step_*.ckpt"), key=step_of)
            for path in paths[: -self.keep]:
                if path != best:
                    path.unlink(missing_ok=True)

    def path(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.folder / f"step_{step:08}.ckpt"

    def listen(self) -> None:
        """Take over the signals; only a process's first thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._hear)

    def stopped(self) -> Stopped | None:
        """What to raise if a signal ended the run."""
        if self.heard is None:
            return None
        return Stopped(f"stopped by {self.heard.name} after step {self.step}: {processes.GO_ON}")

    def _hear(self, number: int, frame: object) -> None:
        again, self.heard = self.heard, signal.Signals(number)
        if again and number == signal.SIGINT:  # pressed twice: they mean now
            raise KeyboardInterrupt
        if self.evaluation.running and not again:
            # Nothing is lost: the step's checkpoint was written before; resumed, it is evaluated.
            raise Stopped(str(self.stopped()))
