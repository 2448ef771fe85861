"""How sure a difference is: the figures of pictures drawn again and again with replacement.

A figure of a set of pictures would have come out otherwise with other pictures. Drawing as many
pictures from the set, with replacement, and counting anew shows by how much; when systems are
compared, all of them are counted on the same draws, so that pictures which are hard for everyone
cancel.

Every draw's figure is exact: that of an evaluation in which each picture is there as often as it
was drawn. What a detection of a picture found does not depend on the other pictures, so pictures
are matched once. A draw then only weights the detections, which are sorted already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from brefine.metrics.average_precision import IGNORED, IOUS, RECALLS, RIGHT, judge, outside
from brefine.metrics.overlaps import SIZES, Flags, Floats, Ints, Overlaps
from brefine.progress import track

BLOCK = 400_000  # weights at once, so that they stay in the cache
FEWEST = 10  # pictures that an interval must rest on


def draw(pictures: int, resamples: int, seed: int) -> Ints:
    """How often each picture is in each draw, ``[P, B]``; columns sum to P."""
    if not pictures:
        return np.zeros((0, resamples), dtype=np.int64)
    shares = np.full(pictures, 1 / pictures)
    return np.random.default_rng(seed).multinomial(pictures, shares, size=resamples).T


class _Ranking(NamedTuple):
    """The detections of one class that are right or wrong for objects of one size, best first.

    Attributes:
        label: k.
        size: a.
        pictures: ``[N]``.
        copies: ``[N]``, see ``weights``.
        verdicts: ``[N, T]``.
        objects: the picture of every object that counts, ``[G]``.
    """

    label: int
    size: int
    pictures: Ints
    copies: Ints
    verdicts: NDArray[np.int8]
    objects: Ints

    def weights(self, counts: Ints) -> Ints:
        """How often each row is there, ``[N, B]``, when pictures are there ``counts [P, B]`` times.

        Detections of one picture that have equal scores but not equal verdicts come as a group for
        each copy of the picture, not every detection as often as its picture. So such rows are
        there once for each possible copy: copy 1, 2, ... Other rows are copy 0.
        """
        copies = self.copies[:, None]
        times = counts[self.pictures]
        return np.where(copies > 0, times >= copies, times)

    def precision(self, counts: Ints) -> tuple[Floats, Flags]:
        """AP at each IoU, ``[T, B]``, 0 where there is no object; and whether there is, ``[B]``."""
        objects = counts[self.objects].sum(0)
        average = np.zeros((self.verdicts.shape[1], counts.shape[1]))
        if not objects.any():
            return average, objects > 0
        weights = self.weights(counts)
        before = weights.cumsum(0)  # detections up to here
        for t, verdicts in enumerate(self.verdicts.T):
            # Recall changes only where a detection is right: only there precision is wanted.
            rows = np.flatnonzero(verdicts == RIGHT)
            right, kept = weights[rows].cumsum(0), before[rows]
            ignored = np.flatnonzero(verdicts == IGNORED)
            if len(ignored):
                lost = np.pad(weights[ignored].cumsum(0), ((1, 0), (0, 0)))
                kept = kept - lost[np.searchsorted(ignored, rows)]
            precision = right / np.maximum(kept, 1)
            best = np.maximum.accumulate(precision[::-1])[::-1]
            # How many of the recalls that precision is read at are reached, and first reached here.
            reached = np.searchsorted(RECALLS, right / np.maximum(objects, 1), side="right")
            average[t] = (best * np.diff(reached, axis=0, prepend=0)).sum(0) / len(RECALLS)
        average[:, objects == 0] = 0
        return average, objects > 0


@dataclass
class Sample:
    """Collects pictures one by one like a `Tally`, and gives AP for any weights of the pictures.

    Args:
        classes: K.
        kinds: some of ``KINDS``.
        groups: further means over classes, ``AP_{name}``: flags ``[K]``.
    """

    classes: int
    kinds: Sequence[str]
    groups: Mapping[str, Flags] = field(default_factory=dict)
    _found: list[tuple[Ints, Ints, Floats]] = field(default_factory=list)
    _verdicts: dict[str, list[NDArray[np.int8]]] = field(default_factory=dict)
    _objects: list[tuple[Ints, Ints, Flags]] = field(default_factory=list)

    def __post_init__(self) -> None:
        none = np.zeros(0, dtype=np.int64)
        sizes = len(SIZES)
        self._found.append((none, none, np.zeros(0)))
        self._objects.append((none, none, np.zeros((sizes, 0), dtype=bool)))
        empty = np.zeros((0, sizes, len(IOUS)), dtype=np.int8)
        self._verdicts = {kind: [empty] for kind in self.kinds}

    def add(self, overlaps: Overlaps) -> None:
        """One more picture; the order of the pictures decides between equal scores."""
        ignored = outside(overlaps.true_areas) | overlaps.crowd
        here = np.full_like(overlaps.true_labels, overlaps.picture)
        self._objects.append((here, overlaps.true_labels, ~ignored))
        here = np.full_like(overlaps.labels, overlaps.picture)
        self._found.append((here, overlaps.labels, overlaps.scores))
        for kind in self.kinds:
            self._verdicts[kind].append(judge(overlaps, kind, ignored))

    def holding(self) -> dict[str, int]:
        """How many pictures hold an object that ``AP``, ``AP_S``, ... counts."""
        pictures, labels, counts = _columns(self._objects)
        return {
            key: len(np.unique(pictures[counts[size] & classes[labels]]))
            for key, (classes, size) in self._means().items()
        }

    def figures(self, counts: Ints, title: str | None = None) -> dict[str, Floats]:
        """AP of weighted pictures.

        Args:
            counts: ``[P, B]``, how often each picture of the data set is there. Rows of pictures
                that were not added do not matter.
            title: of a bar on stderr; None: none.

        Returns:
            ``{kind}/AP``, ``AP50``, ``AP75``, ``AP_S``, ``AP_M``, ``AP_L`` and those of the
            groups: ``[B]``, 0..1, NaN where there is no object.
        """
        means = self._means()
        draws = counts.shape[1]
        most = int(counts.max(initial=1))
        values = {}
        for kind in self.kinds:
            sums = {key: np.zeros((len(IOUS), draws)) for key in means}
            known = {key: np.zeros(draws) for key in means}
            rankings = self._rankings(kind, most)
            name = f"{title}, {kind}"
            for ranking in track(rankings, name, len(rankings)) if title and rankings else rankings:
                wanted = [
                    k for k, (c, a) in means.items() if c[ranking.label] and a == ranking.size
                ]
                step = max(1, BLOCK // (len(ranking.pictures) + 1))
                for start in range(0, draws, step):
                    columns = slice(start, start + step)
                    average, there = ranking.precision(counts[:, columns])
                    for key in wanted:
                        sums[key][:, columns] += average
                        known[key][columns] += there
            for key in means:
                with np.errstate(invalid="ignore"):
                    mean = sums[key] / known[key]  # 0 / 0 is NaN: no object
                values[f"{kind}/{key}"] = mean.mean(0)
                if key == "AP":
                    values[f"{kind}/AP50"], values[f"{kind}/AP75"] = mean[0], mean[5]
        return values

    def _means(self) -> dict[str, tuple[Flags, int]]:
        """Which classes and which of ``SIZES`` a figure is a mean over."""
        every = np.ones(self.classes, dtype=bool)
        sizes = {f"AP{size}": (every, a) for a, size in enumerate(SIZES)}
        return sizes | {f"AP_{name}": (flags, 0) for name, flags in self.groups.items()}

    def _rankings(self, kind: str, most: int) -> list[_Ranking]:
        """Of each class and size with objects; no picture is there more than ``most`` times."""
        pictures, labels, scores = _columns(self._found)
        verdicts = np.concatenate(self._verdicts[kind])
        # By class, then by score; equal scores stay in the order of the pictures.
        order = np.lexsort((-scores, labels))
        pictures, labels, scores = pictures[order], labels[order], scores[order]
        verdicts = verdicts[order]
        rows, copies = _copy_ties((labels, scores, pictures), verdicts, most)
        pictures, labels, verdicts = pictures[rows], labels[rows], verdicts[rows]
        limits = np.searchsorted(labels, np.arange(self.classes + 1)).tolist()
        true_pictures, true_labels, counts = _columns(self._objects)
        rankings = []
        for k in np.unique(true_labels).tolist():
            here = slice(limits[k], limits[k + 1])
            for a in range(len(SIZES)):
                objects = true_pictures[counts[a] & (true_labels == k)]
                matter = (verdicts[here, a] != IGNORED).any(1)
                columns = pictures[here][matter], copies[here][matter], verdicts[here, a][matter]
                if len(objects):
                    rankings.append(_Ranking(k, a, *columns, objects))
        return rankings


def _columns(parts: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The parts' first, second, ... arrays, each joined along the last axis."""
    return tuple(np.concatenate(column, -1) for column in zip(*parts, strict=True))


def _copy_ties(
    keys: tuple[Ints, Floats, Ints], verdicts: NDArray[np.int8], most: int
) -> tuple[Ints, Ints]:
    """Rows in order, those of a tie ``most`` times; and copy 1, 2, ... of a tie, else 0.

    A tie is neighbours whose keys agree (class, score, picture) and whose verdicts do not.
    """
    count = len(verdicts)
    same = np.ones(max(count - 1, 0), dtype=bool)
    for key in keys:
        same &= key[1:] == key[:-1]
    group = np.append(0, (~same).cumsum())[:count]
    differ = same & (verdicts[1:] != verdicts[:-1]).any((1, 2))
    tied = np.isin(group, group[1:][differ])
    rows = np.arange(count).repeat(np.where(tied, most, 1))
    first = np.searchsorted(rows, rows)
    copies = np.where(tied[rows], np.arange(len(rows)) - first + 1, 0)
    order = np.lexsort((rows, copies, group[rows]))
    return rows[order], copies[order]


class Difference(NamedTuple):
    """A figure of one system against that of another.

    Attributes:
        value: of the one, 0..1; NaN where there is no object.
        difference: to the other.
        low: end of the 95 % interval of the difference.
        high: its other end.
        pictures: how many pictures hold an object that the figure counts.
    """

    value: float
    difference: float
    low: float
    high: float
    pictures: int

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``within noise``, or ``few pictures``, too few to tell."""
        if math.isnan(self.difference):
            return "-"
        if self.pictures < FEWEST:
            return "few pictures"
        if self.low <= 0 <= self.high:
            return "within noise"
        return "better" if self.low > 0 else "worse"


def interval(one: Floats, other: Floats) -> tuple[float, float]:
    """The middle 95 % of paired differences; draws without any object are left out."""
    differences = one - other
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return math.nan, math.nan
    low, high = np.percentile(differences, [2.5, 97.5]).tolist()
    return low, high
