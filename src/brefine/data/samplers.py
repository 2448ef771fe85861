"""Which pictures make up an epoch, in which order and on which process."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from brefine.data.coco import CocoSet
from brefine.progress import track

#: (epoch, index of the picture, how many times the epoch has shown it before)
Key = tuple[int, int, int]


class EpochSampler(Sampler[Key]):
    """The pictures of an epoch in an order that follows from (seed, epoch) alone.

    Every ``batch_size`` keys are a batch. Processes take the batches in turn, so that together
    they show the same epoch as one process with larger batches: every process computes the whole
    order and keeps its share. An epoch is as many full steps as show everything once; what is
    missing in the last one is taken from the start of the same order again, so no picture is
    left out and every process has as many batches.

    With ``groups`` a batch is of one group; what is left over in each of them, fewer than a
    batch, makes up the last batches together, so that groups cost neither pictures nor repeats.

    Yields ``(epoch, index, copy)``: a picture that comes again is drawn differently. Lightning's
    Trainer calls ``set_epoch`` before each epoch, so a resumed run goes on where it was; without
    it each pass is the next epoch.

    Args:
        size: number of pictures.
        seed: of the order.
        batch_size: pictures a batch, on each process.
        processes: how many share an epoch; with more than one, the rank is that of
            ``torch.distributed`` when a pass begins.
        groups: ``[size]`` whole numbers; None: all in one.
        factors: ``[size]`` how often each picture comes on average; one that is not whole is
            rounded anew in each pass, up or down at random. None: once.
        repeats: passes over the pictures that make up an epoch.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        batch_size: int = 1,
        processes: int = 1,
        groups: ArrayLike | None = None,
        factors: ArrayLike | None = None,
        repeats: int = 1,
    ) -> None:
        self.size, self.seed, self.epoch = size, seed, 0
        self.batch_size, self.processes, self.repeats = batch_size, processes, repeats
        self.groups = np.zeros(size, int) if groups is None else np.asarray(groups)
        self.factors = None if factors is None else np.asarray(factors, float)
        self.skipped = 0
        shown = repeats * (size if self.factors is None else float(self.factors.sum()))
        self.steps = math.ceil(shown / (batch_size * processes))

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass."""
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Leave out this many batches of this process at the start of the next pass."""
        self.skipped = batches

    def __len__(self) -> int:
        """Keys of one process in an epoch."""
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        epoch, skipped = self.epoch, self.skipped
        self.epoch, self.skipped = epoch + 1, 0
        rank = 0
        if self.processes > 1:
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            if world != self.processes:
                raise RuntimeError(f"{world} processes share an epoch made for {self.processes}")
        keys = self.share(epoch, rank)[skipped * self.batch_size :]
        return ((epoch, index, copy) for index, copy in keys.tolist())

    def share(self, epoch: int, rank: int) -> NDArray[np.int64]:
        """(index, copy) of everything that a process shows in an epoch, ``[len(self), 2]``."""
        random = np.random.default_rng((self.seed, epoch))
        order = self._order(random)
        order = np.resize(order, len(self) * self.processes)  # fills up from the start
        order = np.stack([order, _count_earlier(order)], 1)
        order = order[_batch(self.groups[order[:, 0]], self.batch_size)]
        return order.reshape(-1, self.processes, self.batch_size, 2)[:, rank].reshape(-1, 2)

    def _order(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Every pass over the pictures, one after the other."""
        passes, rest = [], random.random()
        for _ in range(self.repeats):
            order = random.permutation(self.size)
            if self.factors is not None:
                # Whole numbers that the running sum of the factors passes: as many for each
                # picture as its factor rounded up or down, on average the factor. The sum runs
                # on from pass to pass, so that all of them together fit the epoch.
                sums = self.factors[order].cumsum() + rest
                order = np.repeat(order, np.diff(np.floor(sums).astype(int), prepend=0))
                order, rest = random.permutation(order), sums[-1] % 1
            passes.append(order)
        return np.concatenate(passes)


def _count_earlier(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal values come before each."""
    place = np.argsort(values, kind="stable")
    ranked = values[place]
    earlier = np.empty_like(place)
    earlier[place] = np.arange(len(values)) - np.searchsorted(ranked, ranked)
    return earlier


def _batch(groups: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """An order in which every ``size`` places are of one group, as long as that works out.

    A batch comes when its last member would have come; what is left over comes at the end.
    """
    full, rest = [], []
    for group in np.unique(groups):
        places = np.flatnonzero(groups == group)
        whole = len(places) // size * size
        full.append(places[:whole].reshape(-1, size))
        rest.append(places[whole:])
    if not full:
        return np.arange(0)
    batches = np.concatenate(full)
    batches = batches[np.argsort(batches[:, -1])]
    return np.concatenate([batches.ravel(), np.sort(np.concatenate(rest))])


def aspect_groups(dataset: CocoSet) -> NDArray[np.int64]:
    """1 for every picture that is higher than wide, else 0."""
    return np.array([p.size[0] > p.size[1] for p in dataset.pictures], dtype=np.int64)


def repeat_factors(dataset: CocoSet, threshold: float) -> NDArray[np.float64]:
    """How often each picture should come, so that rare classes are seen more often.

    ``r(I) = max over the classes c in I of max(1, sqrt(threshold / f(c)))``, where ``f(c)`` is
    the share of the pictures that show c (Gupta et al., LVIS, CVPR 2019, section 4.2). Crowd
    regions do not count; a picture without objects comes once.
    """
    size = len(dataset)
    numbers = {category.id: label for label, category in enumerate(dataset.categories)}
    shown = [
        sorted({numbers[e["category_id"]] for e in dataset.annotations(i) if not e.get("iscrowd")})
        for i in track(range(size), "count classes", size)
    ]
    counts = np.bincount([c for classes in shown for c in classes], minlength=len(numbers))
    factors = np.sqrt(threshold * size / counts.clip(1)).clip(1)
    return np.array([max([1.0, *factors[classes]]) for classes in shown])
