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

RUNGS = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the items after which the race is judged."""
_CAUTION = 0.75
"""Largest bet as a share of what could lose everything."""


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


def rungs(total: int, seed: int, shares: Sequence[float] = RUNGS) -> list[Indices]:
    """The items of each rung, in ascending order within it."""
    order = race_order(total, seed)
    cuts = [round(share * total) for share in shares]
    return [np.sort(part) for part in np.split(order, cuts[:-1]) if len(part)]


def run_race(
    evaluate: Callable[[int, Indices], NDArray[np.floating[Any]]],
    finish: Callable[[], Items],
    rivals: Sequence[bytes],
    seed: int = 0,
    alpha: float = 0.05,
    total: int | None = None,
) -> Raced:
    """Score rung after rung until a rival has won or all items are scored.

    ``evaluate(rung, items)`` gives the items' values; ``finish()`` the results of all items after the
    last rung. ``rivals`` are ``Score.items`` of full evaluations on the same items. The chance to stop
    a sub-network that is truly as accurate (over all items) as every rival is at most ``alpha``.
    """
    known = [Items.unpack(rival) for rival in rivals]
    total = len(known[0].values) if total is None else total
    parts = rungs(total, seed)
    values = np.full(total, np.nan)
    for number, part in enumerate(parts[:-1]):
        values[part] = evaluate(number, part)
        seen = np.flatnonzero(~np.isnan(values))
        order = race_order(total, seed)
        ordered = order[~np.isnan(values[order])]
        winner = _winner(known, values, ordered, total, alpha)
        if winner is not None:
            return Raced(_behind(known[winner], values, seen), winner, len(seen), total)
    values[parts[-1]] = evaluate(len(parts) - 1, parts[-1])
    return Raced(finish().score(), None, total, total)


def dominance_evidence(differences: NDArray[np.floating[Any]], total: int) -> float:
    """Largest evidence so far that the mean of ``total`` differences in [-1, 1] is above 0.

    ``differences`` are the first ones of a random order, drawn without replacement. Under the
    hypothesis that the mean is 0 or below, the chance that this ever reaches 1/alpha is at most alpha
    (a betting martingale for sampling without replacement: Waudby-Smith and Ramdas, arXiv 2006.04347).
    """
    capital, best = 1.0, 1.0
    seen, squares = 0.0, 0.0
    for index, difference in enumerate(differences.tolist()):
        bound = -seen / (total - index)
        if bound <= -1:
            return float("inf")
        mean = seen / (index + 1)
        variance = (squares + 0.25) / (index + 1)
        bet = min(max(mean / (variance + mean**2), 0.0), _CAUTION / (1 + bound))
        capital *= 1 + bet * (difference - bound)
        best = max(best, capital)
        seen += difference
        squares += difference**2
    return best


def _winner(
    rivals: Sequence[Items],
    values: NDArray[np.floating[Any]],
    ordered: Indices,
    total: int,
    alpha: float,
) -> int | None:
    """The rival with the strongest evidence, if it is enough for all rivals together."""
    evidence = []
    for rival in rivals:
        weights = _item_weights(rival)
        differences = (rival.values[ordered] - values[ordered]) * weights[ordered] / weights.max()
        evidence.append(dominance_evidence(differences, total))
    if not evidence or max(evidence) < len(rivals) / alpha:
        return None
    return int(np.argmax(evidence))


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
