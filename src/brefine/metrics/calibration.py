"""From a score to the probability that the detection is right.

Right means what it means for the thresholds: an object of the class found at mask IoU 0.5. A score
says which of two detections to believe rather; Rank & Sort teaches nothing else, and its scores
run high. The map from score to probability is one for all classes, so that the order of detections
of different classes stays, too:

    * From 300 detections on it is an isotonic regression: of all rising functions the one with the
      least squared error, found by pooling adjacent violators. Detections enter in groups of 10
      neighbours, so that no value rests on fewer; of more than 30 steps those are merged first
      that cost the least squared error; straight lines join the steps' mean scores.
    * With fewer it is Platt's: ``sigmoid(a logit(score) + b)`` with a >= 0, at 32 scores, joined
      by straight lines, and no surer than n right ones of n would be, (n + 1) / (n + 2).
    * Either way the map is ``(1 - SLOPE)`` times that, plus ``SLOPE`` times the score. So it rises
      strictly, scores that differ by 1e-12 or more stay apart (in double precision), equal ones
      stay equal, and no figure that counts from the ranking changes; AP does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a map is read with an exported model, too, where there is no torch
    from brefine.metrics.overlaps import Flags, Floats, Ints
    from brefine.metrics.thresholds import Hits

FEWEST = 300  # detections for an isotonic regression
GROUP = 10  # detections that a step has at least
STEPS = 30  # at most
SLOPE = 1e-3
BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Calibration:
    """A strictly rising map of 0..1 into itself: straight lines between knots.

    Attributes:
        scores: of the knots, rising from 0 to 1.
        probabilities: there, rising.
    """

    scores: tuple[float, ...] = (0.0, 1.0)
    probabilities: tuple[float, ...] = (0.0, 1.0)

    def __call__(self, scores: Any) -> Floats:
        """Probabilities of scores (any shape), in double precision."""
        values = np.asarray(scores, dtype=np.float64)
        mapped: Floats = np.interp(values, self.scores, self.probabilities)
        return mapped

    @classmethod
    def parse(cls, value: Any) -> Calibration:
        """From what JSON gives back of ``as_dict``.

        Raises:
            ValueError: that is no such map.
        """
        if not isinstance(value, dict) or set(value) != {"scores", "probabilities"}:
            raise ValueError("expected scores and probabilities")
        knots = np.array([value["scores"], value["probabilities"]], dtype=np.float64)
        rising = knots.ndim == 2 and knots.shape[1] >= 2 and bool((np.diff(knots) > 0).all())
        if (
            not rising
            or knots.min() < 0
            or knots.max() > 1
            or (knots[0, 0], knots[0, -1]) != (0, 1)
        ):
            raise ValueError("expected knots that rise from score 0 to score 1, all in 0..1")
        return cls(*map(tuple, knots.tolist()))

    def as_dict(self) -> dict[str, list[float]]:
        """Ready for JSON, which keeps every digit."""
        return {"scores": list(self.scores), "probabilities": list(self.probabilities)}


#: of scores that are left as they are
IDENTITY = Calibration()


def fit(scores: Floats, right: Flags) -> Calibration:
    """The map under which a score means how often such detections are right.

    Args:
        scores: ``[D]``. Where one is outside 0..1 or there is none, the map changes nothing.
        right: ``[D]``.
    """
    if not len(scores) or scores.min() < 0 or scores.max() > 1:
        return IDENTITY
    knots, values = _isotonic(scores, right) if len(scores) >= FEWEST else _platt(scores, right)
    values = (1 - SLOPE) * values + SLOPE * knots
    return Calibration(tuple(knots.tolist()), tuple(values.tolist()))


def cross_fitted(hits: Hits) -> Floats:
    """``[D]`` probabilities under maps that were fitted without the detection's own picture.

    Pictures of odd numbers get the map that those of even numbers give, and the other way round.
    Scores that no map can be fitted to, see `fit`, stay as they are.
    """
    if len(hits.scores) and (hits.scores.min() < 0 or hits.scores.max() > 1):
        return hits.scores
    odd = hits.pictures % 2 == 1
    probabilities = np.zeros(len(odd))
    for part in (odd, ~odd):
        probabilities[part] = fit(hits.scores[~part], hits.right[~part])(hits.scores[part])
    return probabilities


def calibration_error(scores: Floats, right: Flags) -> float:
    """Expected calibration error, 0..1: how far scores are from how often they are right.

    Mean over the detections of the difference between mean score and share of right ones in their
    bin, of ``BINS`` bins of equal width. NaN without detections, or where a score is outside 0..1.
    """
    if not len(scores) or scores.min() < 0 or scores.max() > 1:
        return math.nan
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=scores - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(scores))


def pool(values: Floats, weights: Floats) -> Ints:
    """Isotonic regression: the rising function with the least weighted squared error.

    Args:
        values: ``[N]`` in order.
        weights: ``[N]``, above 0.

    Returns:
        ``[B + 1]``: where its steps begin, and N. The function is each step's weighted mean.
    """
    starts: list[int] = []
    means: list[float] = []
    masses: list[float] = []
    for i, (mean, mass) in enumerate(zip(values.tolist(), weights.tolist(), strict=True)):
        start = i
        # Whoever is not above the step before belongs to it, and the two may fall below the next.
        while means and means[-1] >= mean:
            before = masses.pop()
            mean = (means.pop() * before + mean * mass) / (before + mass)
            mass += before
            start = starts.pop()
        starts.append(start)
        means.append(mean)
        masses.append(mass)
    return np.array([*starts, len(values)], dtype=np.int64)


def _isotonic(scores: Floats, right: Flags) -> tuple[Floats, Floats]:
    """Knots from isotonic regression."""
    levels, level = np.unique(scores, return_inverse=True)
    mass = np.bincount(level).astype(np.float64)
    found = np.bincount(level, weights=right).astype(np.float64)
    columns: list[Floats] = [mass, found, levels * mass]
    columns = _sum_up(columns, _group(mass))
    steps = _sum_up(columns, pool(columns[1] / columns[0], columns[0])[:-1])
    while len(steps[0]) > STEPS:  # the two neighbours that cost the least become one
        mass, found, _ = steps
        cost = np.diff(found / mass) ** 2 * mass[1:] * mass[:-1] / (mass[1:] + mass[:-1])
        steps = _sum_up(steps, np.delete(np.arange(len(mass)), cost.argmin() + 1))
    mass, found, sums = steps
    return _to_the_ends(sums / mass, found / mass)


def _group(mass: Floats) -> Ints:
    """Where groups of neighbours begin that have ``GROUP`` detections or just more, from above."""
    starts, held = [], 0.0
    for i in range(len(mass) - 1, -1, -1):
        held += mass[i]
        if held >= GROUP:
            starts.append(i)
            held = 0.0
    starts[-1] = 0  # what is left over at the bottom
    return np.array(starts[::-1], dtype=np.int64)


def _sum_up(columns: list[Floats], starts: Ints) -> list[Floats]:
    """Columns with one row for each group of neighbours."""
    return [np.add.reduceat(column, starts) for column in columns]


def _to_the_ends(knots: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Level lines from the first knot down to 0 and from the last one up to 1."""
    low, high = ([0.0] if knots[0] > 0 else []), ([1.0] if knots[-1] < 1 else [])
    ends = [np.concatenate([low, knots, high]), np.pad(values, (len(low), len(high)), mode="edge")]
    return ends[0], ends[1]


def _platt(scores: Floats, right: Flags) -> tuple[Floats, Floats]:
    """Knots of Platt's logistic map, by Newton's method.

    The aims are not 0 and 1 but a little inside, as Platt has them, so that there is a minimum
    even where all detections are right, or all wrong.
    """
    count, found = len(right), int(right.sum())
    aims = np.where(right, (found + 1) / (found + 2), 1 / (count - found + 2))
    x = np.stack([_logit(scores), np.ones(count)])
    line = np.array([0.0, float(_logit(aims.mean()))])  # the best without slope
    for _ in range(50):
        p = _sigmoid(line @ x)
        step = np.linalg.solve((x * (p * (1 - p))) @ x.T + 1e-6 * np.eye(2), x @ (aims - p))
        line += step * min(1.0, 2.0 / float(np.abs(step).max() + 1e-12))
    if line[0] < 0:  # higher scores are right less often: they tell nothing
        line = np.array([0.0, float(_logit(aims.mean()))])
    knots = np.concatenate([[0.0], _sigmoid(np.linspace(-6, 6, 30)), [1.0]])
    values = _sigmoid(line @ np.stack([_logit(knots), np.ones(len(knots))]))
    return knots, values.clip(1 / (count + 2), (count + 1) / (count + 2))


def _logit(p: Any) -> Floats:
    p = np.clip(p, 1e-4, 1 - 1e-4)
    value: Floats = np.log(p / (1 - p))
    return value


def _sigmoid(x: Floats) -> Floats:
    value: Floats = 1 / (1 + np.exp(-x))
    return value
