"""A learning rate to begin with: the loss while the rate rises (Smith, WACV 2017, section 3.3)."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from brefine import batch_size, pretrained
from brefine.data.loader import train_loader
from brefine.data.read import read
from brefine.losses import total
from brefine.methods import create
from brefine.progress import Progress
from brefine.recipe import Recipe
from brefine.structures import InputError
from brefine.train import Learner

SMOOTH = 0.9  # share of the smoothed loss that a step keeps
DIVERGED = 4.0  # times the lowest loss at which the search ends


class Search(NamedTuple):
    """What a search found.

    Attributes:
        rates: of each step.
        losses: smoothed, after the step before.
        suggestion: the rate at which the loss fell fastest.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float


def find_rate(recipe: Recipe, *, low: float = 1e-6, high: float = 1.0, steps: int = 100) -> Search:
    """Train for some steps from the recipe's start, at a rate that rises from low to high.

    Nothing is kept. The rate is that of a step of this process; ``train.lr_reference_batch``, the
    warm-up and the schedule have no part in it.

    Args:
        recipe: of the run.
        low: the first rate.
        high: the last one; the search ends before if the loss diverges.
        steps: from one to the other.

    Raises:
        InputError: as ``train``; or the loss never fell.
    """
    if not 0 < low < high or steps < 20:
        raise InputError(
            f"rates from {low:g} to {high:g} in {steps} steps: give 20 or more, rising"
        )
    if recipe.data.train is None:
        raise InputError("data.train: name the labelled set to learn from")
    dataset = read(recipe.data.train, recipe.data.images, split="train")
    recipe = batch_size.resolve(recipe, dataset)
    torch.manual_seed(recipe.train.seed)
    size, seed = recipe.train.pictures, recipe.train.seed
    loader = train_loader(dataset, recipe.data, batch_size=size, seed=seed)
    model = create(recipe.model.method, len(dataset.categories), **recipe.model.options)
    assert isinstance(model, nn.Module)
    pretrained.start(model, recipe.model.weights, categories=dataset.categories)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    learner = Learner(model, recipe.train, steps=steps, epoch=len(loader), devices=1)
    optimizer = learner.configure_optimizers()["optimizer"]
    shares = [group["initial_lr"] / learner.lr for group in optimizer.param_groups]
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    rates: list[float] = []
    losses: list[float] = []
    smooth = 0.0
    with Progress("search", steps) as progress:
        for step, (images, targets) in zip(range(steps), batches, strict=False):
            rate = low * (high / low) ** (step / (steps - 1))
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            try:
                moved = [each.to(device) for each in targets]
                named: dict[str, Tensor] = model.loss(images.to(device), moved)
            except InputError:  # Rank & Sort refuses logits that are not finite
                break
            loss = total(named)
            if not loss.isfinite():
                break
            smooth = SMOOTH * smooth + (1 - SMOOTH) * float(loss.detach())
            mean = smooth / (1 - SMOOTH ** (step + 1))
            if step > 10 and mean > DIVERGED * min(losses):
                break
            rates.append(rate)
            losses.append(mean)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if recipe.train.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.train.clip_norm)
            optimizer.step()
            progress.advance(figures=f"rate {rate:.2g}  loss {mean:.3f}")
    return Search(rates, losses, _steepest(rates, losses))


def _steepest(rates: list[float], losses: list[float]) -> float:
    """The rate at which the loss fell fastest, by the logarithm of the rate."""
    if len(rates) < 12:
        raise InputError("the loss diverged at once: begin lower")
    slopes = np.gradient(np.array(losses), np.log(np.array(rates)))[5:]  # the first are noise
    if not slopes.min() < 0 or not math.isfinite(slopes.min()):
        raise InputError("the loss never fell: begin lower, or look at the labels")
    return rates[5 + int(slopes.argmin())]
