"""Racing: an evaluation stops once a sub-network is dominated, at a stated confidence.

Items come in a fixed, seeded order. After each rung the sub-network is compared, item by item, with
rivals that are no worse in every other objective and whose results on all items are known. The test
is anytime-valid, so looking after each rung costs no error beyond ``alpha``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.evaluation.score import CONFIDENCE_Z, Items, Score, paired_difference

Indices = NDArray[np.int64]

RUNG_ITEMS = 8
"""Fewest items that are scored together: fewer would leave the matrix units idle."""
RUNGS = 16
"""Most looks at a race; the test costs nothing for looking, a look costs a small batch of items."""
BETS = (0.08, 0.16, 0.32, 0.64)
"""Bets held at once, as shares of what could lose everything: each size of a lead has its best one."""
ALPHA = 0.05
"""Chance to stop a sub-network that no rival matches, per sub-network."""


@dataclass(frozen=True)
class Raced:
    """Outcome of a race. ``dominated_by`` numbers the rival that won, or is None: all items were scored.

    A stopped race's ``score`` is the rival's, corrected by the paired difference on the items seen
    (its interval is that of the difference), so that it stays below the rival's; its ``items`` are
    empty, because they would not pair with full ones.
    """

    score: Score
    dominated_by: int | None
    evaluated: int
    total: int

    @property
    def saved(self) -> float:
        """Share of the items that were not scored."""
        return 1 - self.evaluated / self.total


def race_order(total: int, seed: int) -> Indices:
    """The order in which items are scored: the same for every sub-network."""
    return np.random.default_rng(seed).permutation(total)


def most_looks(total: int) -> int:
    """Looks at a race over ``total`` items if looking costs nothing else."""
    return max(1, min(RUNGS, total // RUNG_ITEMS))


def rungs(total: int, seed: int, looks: int | None = None) -> list[Indices]:
    """The items of each rung, in ascending order within it; as many rungs as ``looks``."""
    looks = looks or most_looks(total)
    return [np.sort(part) for part in np.array_split(race_order(total, seed), looks)]


def run_race(
    evaluate: Callable[[int, Indices], NDArray[np.floating[Any]]],
    finish: Callable[[], Items],
    rivals: Sequence[bytes],
    total: int,
    seed: int = 0,
    alpha: float = ALPHA,
    looks: int | None = None,
) -> Raced:
    """Score rung after rung until a rival has won or all items are scored.

    ``evaluate(rung, items)`` gives the items' values; ``finish()`` the results of all items after the
    last rung. ``rivals`` are ``Score.items`` of full evaluations on the same ``total`` items. The chance
    to stop a sub-network that is truly as accurate (over all items) as every rival is at most ``alpha``,
    however many rungs (``looks``) there are.
    """
    known = [Items.unpack(rival) for rival in rivals]
    order, parts = race_order(total, seed), rungs(total, seed, looks)
    values = np.full(total, np.nan)
    for number, part in enumerate(parts):
        values[part] = evaluate(number, part)
        if number == len(parts) - 1 or not known:
            continue
        ordered = order[~np.isnan(values[order])]
        winner = _winner(known, values, ordered, total, alpha)
        if winner is not None:
            return Raced(_behind(known[winner], values, np.sort(ordered)), winner, len(ordered), total)
    return Raced(finish().score(), None, total, total)


def dominance_evidence(differences: NDArray[np.floating[Any]], total: int) -> NDArray[np.float64]:
    """Evidence after each of the differences that the mean of all ``total`` of them is above 0.

    ``differences`` in [-1, 1] are the first ones of a random order, drawn without replacement. Under the
    hypothesis that the mean is 0 or below, the chance that the evidence ever reaches 1/alpha is at most
    alpha: capital of a gambler who bets on the next difference being above what the rest must then
    average, split over several sizes of bet (Waudby-Smith and Ramdas, arXiv 2006.04347 and 2010.09686).
    """
    values = np.asarray(differences, np.float64)
    before = np.concatenate([[0.0], np.cumsum(values)])[:-1]
    bound = -before / (total - np.arange(len(values)))
    certain = bound <= -1
    bound = np.where(certain, 0.0, bound)
    stakes = np.asarray(BETS)[:, None] / (1 + bound)
    capital = np.cumprod(1 + stakes * (values - bound), axis=1).mean(axis=0)
    evidence: NDArray[np.float64] = np.where(np.logical_or.accumulate(certain), np.inf, capital)
    return evidence


def _winner(
    rivals: Sequence[Items],
    values: NDArray[np.floating[Any]],
    ordered: Indices,
    total: int,
    alpha: float,
) -> int | None:
    """The rival with the strongest evidence, if that of all rivals together is enough.

    The mean of the rivals' evidence is again a gambler's capital under the hypothesis that none of them
    is more accurate, so that many rivals cost no more error than one.
    """
    evidence = np.empty((len(rivals), len(ordered)))
    for number, rival in enumerate(rivals):
        weights = _item_weights(rival)
        differences = (rival.values[ordered] - values[ordered]) * weights[ordered] / weights.max()
        evidence[number] = dominance_evidence(differences, total)
    together = evidence.mean(axis=0)
    reached = np.flatnonzero(together >= 1 / alpha)
    return int(evidence[:, reached[0]].argmax()) if len(reached) else None


def _item_weights(items: Items) -> NDArray[np.floating[Any]]:
    """Each item's weight in the mean."""
    weights = np.empty(len(items.values))
    for stratum, share in enumerate(items.shares()):
        mine = slice(None) if items.strata is None else items.strata == stratum
        _, counts = items.of(stratum)
        weights[mine] = share * counts / counts.sum()
    return weights


def _behind(rival: Items, values: NDArray[np.floating[Any]], seen: Indices) -> Score:
    """The estimate for a stopped sub-network: the rival's score less the difference on items seen."""
    ours, theirs = _subset(rival, seen, values[seen]), _subset(rival, seen, rival.values[seen])
    difference, stderr = paired_difference(theirs.pack(), ours.pack())
    value = min(1.0, max(0.0, rival.score().value - max(difference, 0.0)))
    half = CONFIDENCE_Z * stderr
    return Score(value, stderr, max(0.0, value - half), min(1.0, value + half), len(seen))


def _subset(items: Items, chosen: Indices, values: NDArray[np.floating[Any]]) -> Items:
    """The chosen items with other values; strata without any item weigh nothing."""
    if items.strata is None:
        return Items(values, items.names, counts=None if items.counts is None else items.counts[chosen])
    strata = items.strata[chosen]
    present, renumbered = np.unique(strata, return_inverse=True)
    shares = items.shares()
    return Items(
        values,
        tuple(items.names[s] for s in present),
        renumbered,
        tuple(shares[s] for s in present),
        None if items.counts is None else items.counts[chosen],
    )
