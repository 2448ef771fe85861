"""Training with Lightning's Trainer, which only this file and the three it is helped by import.

A run folder holds everything about a run: ``recipe.yaml`` as actually used, ``versions.json``,
``categories.json``, ``metrics.csv`` (losses, rates, gradient norms and AP by step),
``curves.html`` that draws it, ``previews/`` and ``faults/`` (batches whose loss was not finite),
``evaluation.json`` and ``predictions.json`` of the end, the model folders ``last/`` and
``best/``, and ``checkpoints/`` to resume from.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from brefine import pretrained, processes, weights
from brefine.checkpoints import FOLDER as CHECKPOINTS
from brefine.checkpoints import (
    Checkpoints,
    Store,
    check,
    describe,
    handlers_kept,
    newest,
    recall,
)
from brefine.data.augment import Transform
from brefine.data.coco import CocoSet
from brefine.data.loader import count_shared, read_labelled, require_pictures, train_loader
from brefine.data.read import read
from brefine.evaluate import Report, evaluate
from brefine.files import replacing
from brefine.guards import (
    GradientGuard,
    LossGuard,
    explain_memory,
    explain_zero,
    find_missing,
    gradient_norm,
    is_memory,
    worst,
)
from brefine.logs import Table, connect, draw
from brefine.losses import total
from brefine.methods import create
from brefine.metrics.shards import agree
from brefine.parts import together
from brefine.parts.winograd import quicken
from brefine.predict import Predictor
from brefine.progress import Progress, console
from brefine.recipe import Recipe, TrainRecipe
from brefine.structures import Images, InputError, Instances

LOG_EVERY = 10  # steps between two rows of metrics.csv
DESCRIPTION = ("recipe.yaml", "versions.json", "categories.json")  # of a run, before it starts
BEGUN = ("metrics.csv", "curves.html", "previews", "faults", "tensorboard", "wandb", "mlflow")
BEST = "mask/AP"  # what decides which model is kept as best/
PREPARED = ("split", "finetune.json")  # what ``finetune`` may have put into a run folder before


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: bool | Literal["auto"] = False,
    devices: int | None = None,
    nodes: int | None = None,
    transform: Transform | None = None,
) -> Path:
    """Train a model as a recipe says, evaluating on the way.

    Args:
        recipe: what to do; ``data.train`` is needed, ``data.val`` may be None.
        out: the run folder; must be new or empty.
        resume: go on from the newest whole checkpoint in ``out`` instead; "auto": if there is
            one, else start.
        devices: processes a machine; None: what a launcher started, else all GPUs, else 1.
        nodes: machines; None: what a launcher started, else 1. Each runs the same command.
        transform: a last augmentation of your own, ``(picture, labels, random) -> (picture,
            labels)``, see ``TrainSet``; the run folder keeps no trace of it.

    Returns:
        The model folder to use: ``out/best``, or ``out/last`` without validation data.

    Raises:
        InputError: the data cannot be used, the run folder is in use or cannot be written to,
            nothing to resume from, or a loss stopped being finite.
        Stopped: by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1; everything up to there is saved. Or
            another process has gone: everything up to the last checkpoint is.
    """
    devices, nodes = processes.count(devices, nodes)
    world, first = devices * nodes, processes.is_first()
    console.quiet = console.quiet or not first
    out = Path(out)
    found = newest(out) if resume else None
    if resume is True and not found:
        raise InputError(f"{out}: no checkpoint to resume from")
    # A run that failed before it had anything to go on from is no loss.
    begun = resume == "auto" or not any((out / CHECKPOINTS).glob("*"))
    if first and not found and out.exists() and not is_free(out, begun=begun):
        raise InputError(f"{out}: there is something already: choose another folder, or resume")
    if recipe.train.batch_size == "auto":
        if found:  # what it was is known
            recipe = recall(found[1], found[0], recipe)
        elif world > 1:
            raise InputError(
                f"train.batch_size: auto: measured by one process, not by {world}: run with "
                "--devices 1 once and take the number that it says, or give one"
            )
    if recipe.data.train is None:
        raise InputError("data.train: name the labelled set to learn from")
    if recipe.train.patience and not (recipe.data.val and recipe.train.validate_every):
        raise InputError("train.patience: needs data.val and train.validate_every to go by")
    dataset = read(recipe.data.train, recipe.data.images, split="train")
    held_out, pictures = recipe.data.val, recipe.data.val_images or recipe.data.images
    validation = read(held_out, pictures) if held_out else None
    if validation:  # before hours of training, not after
        require_pictures(validation)
        read_labelled(validation, 0)
    if validation and validation.categories != dataset.categories:
        raise InputError(
            f"{recipe.data.val}: its categories differ from those of {recipe.data.train}: "
            "ids and names must agree, in the same order"
        )
    if validation and first and (shared := count_shared(validation, dataset)):
        console.print(
            f"{held_out}: {shared} of {len(validation)} pictures are learnt from, too, so AP, "
            "thresholds and calibration will be too good: give others as data.val "
            "(brefine data split)",
            soft_wrap=True,
            markup=False,
        )
    if recipe.train.batch_size == "auto":
        from brefine.batch_size import resolve  # which imports this file

        recipe = resolve(recipe, dataset, transform)
    if recipe.train.precision == "16-mixed" and not torch.cuda.is_available():
        console.print("train.precision: a CPU computes bf16-mixed instead of 16-mixed")
    seed = recipe.train.seed
    L.seed_everything(seed, verbose=False)  # after what was measured, which leaves no trace so
    loader = train_loader(
        dataset,
        recipe.data,
        batch_size=recipe.train.pictures,
        seed=seed,
        processes=world,
        transform=transform,
    )
    model = create(recipe.model.method, len(dataset.categories), **recipe.model.options)
    assert isinstance(model, nn.Module)
    start = "none" if found else recipe.model.weights  # a checkpoint has all
    reused = pretrained.start(model, start, categories=dataset.categories)

    epoch = math.ceil(len(loader) / recipe.train.accumulate)  # steps
    steps = recipe.train.steps or math.ceil((recipe.train.epochs or 0) * epoch)
    skip = recipe.train.on_fault == "skip"
    guard = LossGuard(out, dataset, loader.sampler, skip=skip)
    learner = Learner(model, recipe.train, steps=steps, epoch=epoch, devices=world, guard=guard)
    about = describe(recipe, batches=len(loader), processes=world)
    if found:
        reused = f"resumed from {found[0]}, step {found[1]['global_step']} of {steps}"
        check(found[1], found[0], about, learner.state_dict())
    others = connect(recipe.train.loggers, out)
    if missing := find_missing(dataset) if first else []:
        names = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if missing[10:] else "")
        console.print(
            f"no object in {recipe.data.train} is of class {names}: it cannot be learnt",
            soft_wrap=True,
            markup=False,
        )
    if first:
        _describe(out, recipe, dataset, world, learner.lr, steps, reused)
    table = Table(out / "metrics.csv")
    table.rewind(found[1]["global_step"] if found else 0)
    average = Average(recipe.train.ema) if recipe.train.ema else None
    evaluation = Evaluation(recipe, dataset, validation, out, epoch, average)
    checkpoints = Checkpoints(
        out,
        every=recipe.train.checkpoint_every or min(epoch, 1000),
        keep=recipe.train.keep_checkpoints,
        about=about,
        evaluation=evaluation,
    )
    pulse = processes.Pulse()
    resumed = found and found[0]
    del found  # as large as the model and its optimiser
    strict = torch.are_deterministic_algorithms_enabled()
    strict_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # Hints for people who write Lightning code, not for those who run a recipe.
        warnings.filterwarnings("ignore", module="lightning")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        trainer = L.Trainer(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",  # Apple's has no 64 bits
            devices=devices,
            num_nodes=nodes,
            strategy=DDPStrategy(timeout=processes.MEETING) if world > 1 else "auto",
            precision=recipe.train.precision,
            # RoIAlign and others have no deterministic gradient on a GPU: told, not refused.
            deterministic=("warn" if torch.cuda.is_available() else True)
            if recipe.train.deterministic
            else None,
            max_steps=steps,
            max_epochs=-1,
            use_distributed_sampler=False,  # ours knows the processes
            accumulate_grad_batches=recipe.train.accumulate,
            gradient_clip_val=recipe.train.clip_norm,
            logger=[table, *others],
            callbacks=[  # each looks at what those before it did
                *([average] if average else []),
                Bar(steps),
                checkpoints,
                evaluation,
                pulse,
            ],
            plugins=[Store(), *_cluster()],
            enable_checkpointing=False,  # by Lightning's own callback
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        try:
            with handlers_kept():
                trainer.fit(learner, loader, ckpt_path=resumed, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C, which it also switches off
            raise KeyboardInterrupt from None
        except (RuntimeError, MemoryError) as error:
            if is_memory(error):
                *sizes, objects = learner.batch
                raise InputError(explain_memory(recipe, sizes, objects)) from None
            if world == 1 or not processes.lost_touch(error):
                raise
            raise pulse.explain(error) from None
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=strict_warns)
    if stopped := checkpoints.stopped():
        if not first:  # the first process says so; launchers take others' codes for a crash
            raise SystemExit(0)
        raise stopped
    return out / ("best" if validation else "last")


def _cluster() -> list[Any]:
    """SLURM, told that signals are ours; elsewhere nothing."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def is_free(out: Path, *, begun: bool) -> bool:
    """Whether a run may start in a folder: it is empty, or only ``begun`` by a run like this.

    Such a run has left everything that describes it; a recipe alone is somebody's own.
    """
    if not out.is_dir():
        return False
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")} - {*PREPARED}
    known = {*DESCRIPTION, *BEGUN, CHECKPOINTS}
    return not names or (begun and {*DESCRIPTION} <= names <= known)


class Learner(L.LightningModule):
    """A model with its optimiser and schedule.

    Args:
        model: any Segmenter.
        recipe: optimiser, rates and schedule.
        steps: of the whole training.
        epoch: steps of one pass over the data.
        devices: that share a batch.
        guard: told of losses that are not finite; None: let them be.

    Raises:
        InputError: a pattern of ``train.freeze`` fits no parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: TrainRecipe,
        *,
        steps: int,
        epoch: int,
        devices: int,
        guard: LossGuard | None = None,
    ) -> None:
        super().__init__()
        self.guard, self.gradients = guard, GradientGuard()
        self.place, self.batch = (0, 0, 0), (0, 0, 0)  # of the last batch, and its size
        self.model: nn.Module = quicken(model)
        self.recipe, self.steps = recipe, steps
        self.named: dict[str, Tensor] = {}  # losses of the last batch
        self.learnt = False  # from a batch since the last step
        unit = 1 if recipe.steps else epoch
        self.milestones: list[float] = [steps * 2 / 3, steps * 11 / 12]
        if recipe.milestones is not None:
            self.milestones = [milestone * unit for milestone in recipe.milestones]
        freeze(model, recipe.freeze)
        pictures = devices * recipe.pictures * recipe.accumulate
        scale = pictures / (recipe.lr_reference_batch or 1)
        self.lr = recipe.lr * (scale if recipe.lr_reference_batch else 1)

    def training_step(self, batch: tuple[Images, Sequence[Instances]], index: int) -> Tensor | None:
        """Sum of the named losses; those that start with ``raw_`` are only logged.

        None: the batch is skipped.
        """
        # What is random in a batch follows from its place alone, so that neither what came between
        # (an evaluation, a stop, the number of workers) nor what is resumed makes a difference.
        self.place = (self.current_epoch, index, self.global_rank)
        seed = np.random.SeedSequence((self.recipe.seed, *self.place))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        height, width = batch[0].pixels.shape[-2:]
        self.batch = height, width, sum(len(target) for target in batch[1])
        try:
            with together.switched(self.recipe.rank_together):
                named: dict[str, Tensor] = self.model.loss(*batch)  # type: ignore[operator]
            loss = total(named)
            fault = None if loss.isfinite() else f"the loss is not finite ({worst(named)})"
        except InputError as error:  # Rank & Sort refuses logits that are not finite
            named, loss, fault = {}, torch.zeros(()), str(error)
        self.learnt = self.learnt or self.guard is None
        if self.guard is None:
            return loss
        if fault:
            self.guard.report(batch, self.place, self.global_step, fault)
        else:
            self.guard.passed()
        skip = fault is not None
        if self.recipe.on_fault == "skip" and self.trainer.world_size > 1:
            # all of them skip it, or some would wait for the others
            skip = self.trainer.strategy.reduce_boolean_decision(skip, all=False)
        if skip:
            if self.trainer.world_size == self.recipe.accumulate == 1:
                return None
            # Nothing, but for every parameter: DDP asks for that, and with None Lightning would
            # forget what the other batches of the step have found in 16 bits.
            learnt = [p.flatten()[0] for p in self.model.parameters() if p.requires_grad]
            return torch.stack(learnt).sum() * 0
        self.learnt = True
        self.named = {"loss": loss.detach(), **{k: v.detach() for k, v in named.items()}}
        return loss * self.share(index)

    def share(self, index: int) -> float:
        """What to multiply the loss of an epoch's batch ``index`` with.

        Lightning divides by ``accumulate``, also where an epoch ends with fewer batches.
        """
        wanted = self.recipe.accumulate
        left = int(self.trainer.num_training_batches) % wanted
        last = index >= self.trainer.num_training_batches - left
        return wanted / left if last else 1.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log losses, rate and every part's gradient norm: a starved or exploding head shows."""
        if not self.learnt:  # from none of the step's batches: not even momentum moves
            optimizer.zero_grad()
            return
        self.learnt = False
        norm = self.gradients.look(self.model, self.global_step, self.recipe.clip_norm)
        if not math.isfinite(norm) and self.recipe.precision != "16-mixed":  # its scaler skips it
            fault = f"step {self.global_step}: gradients are not finite, though the loss is"
            if self.recipe.on_fault == "stop":
                raise InputError(f"{fault}: set train.clip_norm, or train.on_fault=skip")
            console.print(f"{fault}: skipped", markup=False, soft_wrap=True)
            optimizer.zero_grad()
        if self.global_step % LOG_EVERY:
            return
        row = {name: float(value) for name, value in self.named.items()}
        row["lr"] = optimizer.param_groups[-1]["lr"]
        for name, part in self.model.named_children():
            row[f"grad_{name}"] = gradient_norm(part) or 0.0
        for logger in self.loggers:
            logger.log_metrics(row, self.global_step)

    def configure_optimizers(self) -> Any:
        """SGD or AdamW; biases and norms do not decay; the trunk's blocks may learn slower."""
        decay = self.recipe.layer_decay
        depths = depths_of(self.model) if decay else {}
        last = max(depths.values(), default=0)
        by_rate: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                rate = (decay or 1.0) ** (last + 1 - depths[name]) if name in depths else 1.0
                by_rate.setdefault((rate, parameter.ndim > 1), []).append(parameter)
        for decays in (True, False):  # what does not belong to the trunk is always there
            by_rate.setdefault((1.0, decays), [])
        groups: list[dict[str, Any]] = [
            {"params": by_rate[rate, decays], "lr": self.lr * rate}
            | ({} if decays else {"weight_decay": 0.0})
            for rate, decays in sorted(by_rate, key=lambda key: (key[0], not key[1]))
        ]
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.recipe.weight_decay}
        optimizer: torch.optim.Optimizer
        if self.recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=self.recipe.momentum, **options)
        else:
            optimizer = torch.optim.AdamW(groups, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step (0-based)."""
        rise = min(1.0, (step + 1) / max(1, self.recipe.warmup_steps))
        if self.recipe.schedule == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        passed = sum(step >= milestone for milestone in self.milestones)
        return float(rise * self.recipe.gamma**passed)

    def transfer_batch_to_device(
        self, batch: tuple[Images, Sequence[Instances]], device: torch.device, index: int
    ) -> tuple[Images, list[Instances]]:
        """Lightning moves tensors only; these are our own structures."""
        images, targets = batch
        return images.to(device), [target.to(device) for target in targets]


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters whose names fit a pattern learn nothing.

    Raises:
        InputError: a pattern fits none, or all are frozen.
    """
    for pattern in patterns:
        fitting = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
        if not fitting:
            known = ", ".join(f"{name}.*" for name, _ in model.named_children())
            raise InputError(f"train.freeze: {pattern!r} fits no parameter: there are {known}")
        for parameter in fitting:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("train.freeze: nothing is left to learn: name fewer parameters")
    model.train()  # norms of the trunk that learn nothing now stay in evaluation


def depths_of(model: nn.Module) -> dict[str, int]:
    """For each parameter of the trunk's body the number of its block, 0 next to the picture.

    A block is everything up to the last number in a name that ends a container's: ``layer1.0``,
    ``blocks.2.1``, ``stages_1.blocks.0``; what comes before them is one, the stem.
    """
    depths, blocks = {}, dict[str, int]()
    for name, _ in model.named_parameters():
        if name.startswith("trunk.body."):
            found = re.match(r"trunk\.body\.\D*\d+(\.\d+|\.(blocks|layers)\.\d+)*", name)
            stem = not found or re.match(r"trunk\.body\.(conv1|bn1|norm1|stem)", name)
            block = "trunk.body" if stem or not found else found[0]
            depths[name] = blocks.setdefault(block, len(blocks))
    return depths


class Bar(L.Callback):
    """Progress over all steps: loss, share of the time spent waiting for data, ETA."""

    def __init__(self, steps: int) -> None:
        self.progress = Progress("train", steps)
        self.waited = self.ended = self.began = 0.0
        self.loss: float | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Show the bar; a resumed run starts where it stopped."""
        self.progress.__enter__()
        self.progress.done = trainer.global_step
        self.began = self.ended = time.monotonic()

    def on_train_batch_start(self, *_: Any) -> None:
        """Count how long this batch was waited for."""
        self.waited += time.monotonic() - self.ended

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """One more step."""
        if module.named:  # else every batch was skipped
            loss = float(module.named["loss"])  # type: ignore[index]
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        self.ended = time.monotonic()
        share = self.waited / max(1e-9, self.ended - self.began)
        figures = f"loss {self.loss:.3f}  " if self.loss is not None else ""
        done = trainer.global_step - self.progress.done
        self.progress.advance(done, figures=f"{figures}data {share:.0%}")

    def on_train_end(self, *_: Any) -> None:
        """Close the bar."""
        self.progress.__exit__(None, None, None)

    def on_exception(self, *_: Any) -> None:
        """Close the bar, so that the message stands below it."""
        self.progress.__exit__(None, None, None)


class Average(WeightAveraging):
    """A moving average of the weights: less noise than the weights of any one step.

    Args:
        decay: share of the average that a step keeps; less at first, ``(1 + n) / (10 + n)`` after
            ``n`` steps, so that the random start is soon forgotten.
    """

    def __init__(self, decay: float) -> None:
        @torch.no_grad()
        def mix(average: Any, current: Any, count: Tensor | int) -> None:
            kept = min(decay, (1 + int(count)) / (10 + int(count)))
            if average[0].is_floating_point():  # what does not change stays so, to the last bit
                torch._foreach_lerp_(average, current, 1 - kept)
            else:
                torch._foreach_copy_(average, current)

        super().__init__(multi_avg_fn=mix)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights."""
        assert self._average_model is not None
        learner: Learner = self._average_model.module  # type: ignore[assignment]
        return learner.model

    def on_train_end(self, *_: Any) -> None:
        """The weights of the last step stay what they are."""


class Evaluation(L.Callback):
    """Evaluates every so often, keeps the best model and, at the end, the last."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: CocoSet,
        validation: CocoSet | None,
        out: Path,
        epoch: int,
        average: Average | None,
    ) -> None:
        self.average = average
        self.recipe, self.dataset, self.validation, self.out = recipe, dataset, validation, out
        every = recipe.train.validate_every
        self.every = max(1, round(every * epoch)) if every and validation else None
        self.best, self.best_step = -math.inf, -1
        self.since = 0  # evaluations that were not better
        self.step = 0  # that was evaluated last
        self.writes = True
        self.loggers: list[Logger] = []
        self.running = self.stopping = False

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Every process evaluates its share of the pictures; the first one says and writes."""
        self.writes, self.loggers = trainer.is_global_zero, trainer.loggers

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in ("best", "best_step", "since", "step")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What a resumed run needs."""
        for name, value in state.items():
            setattr(self, name, value)

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether to evaluate this step; the end of training has an evaluation of its own."""
        step = trainer.global_step
        due = self.every is not None and step % self.every == 0
        return due and self.step < step < trainer.max_steps

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A run that stopped in an evaluation goes on with it."""
        self.on_train_batch_end(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Evaluate when it is time, and end training when its patience is at an end."""
        if not self.is_due(trainer) or self.stopping:
            return
        self.step = trainer.global_step
        self.run(module.model, f"step {self.step}")  # type: ignore[arg-type]
        trainer.strategy.barrier()
        if self.recipe.train.patience and self.since >= self.recipe.train.patience:
            if self.writes:
                console.print(f"no better model for {self.since} evaluations: training ends")
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The last evaluation, with mask quality given ground-truth boxes, and ``last/``."""
        if self.stopping:
            return
        self.step = trainer.global_step
        model: nn.Module = module.model  # type: ignore[assignment]
        report = self.run(model, "end", given_boxes=True)
        self.save("last", self.average.model if self.average else model, report)
        if report and self.writes:
            report.save(self.out)
        elif self.writes:  # no evaluation has drawn them
            draw(self.out / "metrics.csv", self.out / "curves.html")
        trainer.strategy.barrier()  # nobody goes on before everything is written

    def run(self, model: nn.Module, when: str, *, given_boxes: bool = False) -> Report | None:
        """Evaluate, say the main figures, and keep the model if it is the best so far."""
        if self.validation is None:
            return None
        data = self.recipe.data
        learning, model = model, self.average.model if self.average else model
        agree(model)
        predictor = Predictor(
            model,
            self.dataset.categories,
            short_side=data.short_side[-1],
            long_side=data.long_side,
            device=next(model.parameters()).device,
        )
        self.running = True
        try:
            report = evaluate(predictor, self.validation, given_boxes=given_boxes)
        finally:
            self.running = False
        learning.train()
        named = {"mask AP": "mask/AP", "boundary AP": "boundary/AP", "box AP": "box/AP"}
        found = {title: 100 * report.values[key] for title, key in named.items()}
        figures = (f"{t} {'-' if math.isnan(v) else f'{v:.1f}'}" for t, v in found.items())
        if self.writes:
            console.print(f"{when}: {', '.join(figures)}")
            self.follow(report, predictor)
            warm = self.step > self.recipe.train.warmup_steps
            if warm and (cause := explain_zero(report.values, report.records, self.recipe)):
                console.print(cause, soft_wrap=True, markup=False)
        value, before = report.values[BEST], self.best
        if not value < before:  # of equals the newest; NaN, where no object is, compares with none
            self.best, self.best_step = value, self.step
            self.save("best", model, report)
        # As long as nothing at all is found, there is no best that could not be beaten.
        self.since = self.since + 1 if value <= before and before > 0 else 0
        return report

    def follow(self, report: Report, predictor: Predictor) -> None:
        """Write the figures where they are followed, draw the curves, and a few pictures."""
        keys = ("mask/AP", "mask/AP50", "boundary/AP", "box/AP")
        row = {f"val/{k}": v for k in keys if not math.isnan(v := report.values[k])}
        for logger in self.loggers:
            logger.log_metrics(row, self.step)
        draw(self.out / "metrics.csv", self.out / "curves.html")
        assert self.validation is not None
        shown = self.validation.pictures[: self.recipe.train.previews]
        stems = Counter(picture.file.stem for picture in shown)
        for number, picture in enumerate(shown, 1):
            stem = picture.file.stem
            stem += f"_{number}" if stems[stem] > 1 else ""  # of several folders
            name = f"previews/step_{self.step:08}/{stem}.png"
            with replacing(self.out / name) as aside:
                found = predictor(picture.file, threshold=report.overall)
                found.draw().save(aside, format="png")

    def save(self, name: str, model: nn.Module, report: Report | None) -> None:
        """Write a model folder inside the run folder, with what the report says of its scores."""
        if not self.writes:
            return
        learnt = report.scoring() if report else {}
        weights.save(self.out / name, model, self.recipe, self.dataset.categories, **learnt)


def _describe(
    out: Path,
    recipe: Recipe,
    dataset: CocoSet,
    world: int,
    lr: float,
    steps: int,
    reused: str,
) -> None:
    """Say what is about to happen, and write down what it depends on."""
    out.mkdir(parents=True, exist_ok=True)
    recipe.save(out / "recipe.yaml")
    names = ("brefine", "torch", "torchvision", "timm", "lightning", "numpy")
    facts: dict[str, Any] = {name: version(name) for name in names}
    facts.update(python=platform.python_version(), platform=platform.platform())
    facts.update(seed=recipe.train.seed, steps=steps, lr=lr)
    table = [category._asdict() for category in dataset.categories]
    for name, value in (("versions.json", facts), ("categories.json", table)):
        with replacing(out / name) as aside:
            aside.write_text(json.dumps(value, indent=1), encoding="utf-8")
    rate = f"lr {lr:g}"
    if lr != recipe.train.lr:
        rate += f" (scaled from {recipe.train.lr:g} at {recipe.train.lr_reference_batch} pictures)"
    pictures = f"{recipe.train.batch_size}" + (f" on {world} processes" if world > 1 else "")
    console.print(
        f"{recipe.model.method}: {len(dataset)} pictures, {len(dataset.categories)} classes, "
        f"{steps} steps of {pictures}, {rate}; run folder {out}",
        soft_wrap=True,
    )
    console.print(reused, soft_wrap=True, markup=False)
