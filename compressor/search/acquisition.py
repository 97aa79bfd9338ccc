"""Which candidates to evaluate next: those that should add most to the hypervolume of the front.

The expected improvement follows Emmerich et al. (2006), estimated by sampling the predictors'
uncertainty; with no uncertainty it is the improvement of the predicted front itself. A batch is picked
one by one, each pick believed as predicted (Ginsbourger et al., 2010, "Kriging believer").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compressor.search.evolution import Guesses
from compressor.search.front import hypervolume, nondominated

Array = NDArray[np.float64]

SHORTLIST = 200
"""Candidates that are compared one by one; the others are farther behind the predicted front."""
DRAWS = 24
"""Samples of a candidate's uncertain costs."""


def pick(
    candidates: Guesses,
    deviations: Array,
    front: Array,
    evaluated: Array,
    count: int,
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """Rows of up to ``count`` candidates, the most promising first.

    ``deviations`` (n, objectives) of the candidates' costs, 0 where known; ``front`` (m, objectives) the
    costs of feasible evaluated sub-networks, m may be 0; ``evaluated`` (k, objectives) all costs, for the
    scale. Those predicted within the limits come before the others.
    """
    ideal, span = _scale(np.concatenate([evaluated, candidates.costs]))
    costs = (candidates.costs - ideal) / span
    spread = deviations / span
    believed = (front - ideal) / span
    missed = np.maximum(candidates.violations, 0).sum(axis=1)
    chosen: list[int] = []
    for pool in (np.flatnonzero(missed <= 0), np.flatnonzero(missed > 0)):
        if len(chosen) >= count or not len(pool):
            continue
        if pool[0:1].size and missed[pool[0]] > 0:
            nearest = pool[np.argsort(missed[pool], kind="stable")]
            chosen.extend(int(row) for row in nearest[: count - len(chosen)])
        else:
            short = pool[np.argsort(_distance_behind(costs[pool], believed), kind="stable")[:SHORTLIST]]
            chosen.extend(_greedy(costs, spread, short, believed, count, rng))
    return np.array(chosen[:count], dtype=np.intp)


def improvements(points: Array, front: Array, reference: Array) -> Array:
    """(n,) hypervolume that each of ``points`` (n, objectives) alone would add to ``front``."""
    if points.shape[1] == 2:
        return _improvements_2d(points, front, reference)
    base = hypervolume(front, list(reference))
    gained = [hypervolume(np.vstack([front, point[None]]), list(reference)) - base for point in points]
    return np.array(gained)


def _greedy(
    costs: Array,
    spread: Array,
    short: NDArray[np.intp],
    believed: Array,
    count: int,
    rng: np.random.Generator,
) -> list[int]:
    """Rows of the shortlist, each the largest (expected) improvement after the ones before it."""
    reference = np.full(costs.shape[1], 1.1)
    draws = rng.standard_normal((DRAWS if spread.any() else 1, *costs[short].shape)) if spread.any() else None
    chosen: list[int] = []
    free = list(range(len(short)))
    while free and len(chosen) < count:
        rows = short[free]
        front = believed[nondominated(believed)] if len(believed) else believed
        if draws is None:
            gains = improvements(costs[rows], front, reference)
        else:
            sampled = costs[rows] + draws[:, free] * spread[rows]
            flat = improvements(sampled.reshape(-1, costs.shape[1]), front, reference)
            gains = flat.reshape(len(draws), -1).mean(axis=0)
        if gains.max() <= 1e-12:
            gains = -_distance_behind(costs[rows], believed)
        best = int(np.argmax(gains))
        row = int(rows[best])
        chosen.append(row)
        free.pop(best)
        believed = np.vstack([believed, costs[row : row + 1]])
    return chosen


def _distance_behind(points: Array, front: Array) -> Array:
    """How far each point lies behind the front (additive epsilon); negative in front of it."""
    if not len(front):
        return np.asarray(points.sum(axis=1))
    return np.asarray((points[:, None, :] - front[None, :, :]).min(axis=2).max(axis=1))


def _scale(costs: Array) -> tuple[Array, Array]:
    ideal, nadir = costs.min(axis=0), costs.max(axis=0)
    span = nadir - ideal
    return ideal, np.where(span > 0, span, 1.0)


def _improvements_2d(points: Array, front: Array, reference: Array) -> Array:
    """Exact, in one sweep over the steps of the front."""
    kept = front[np.all(front < reference, axis=1)] if len(front) else front.reshape(0, 2)
    if len(kept):
        kept = kept[nondominated(kept)]
    kept = kept[np.argsort(kept[:, 0], kind="stable")]
    starts = np.concatenate([[-np.inf], kept[:, 0]])
    ends = np.concatenate([kept[:, 0], [reference[0]]])
    heights = np.concatenate([[reference[1]], kept[:, 1]])
    wide = np.maximum(0.0, ends[None] - np.maximum(points[:, :1], starts[None]))
    high = np.maximum(0.0, heights[None] - points[:, 1:2])
    return np.asarray((wide * high).sum(axis=1))
