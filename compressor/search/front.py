"""The answer of a search: the front of what was evaluated, its hypervolume, and the winner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from compressor.errors import InfeasibleError
from compressor.search.problem import Outcome, Problem

Costs = NDArray[np.float64]


@dataclass(frozen=True)
class Miss:
    """A budget that an outcome is over, and by how much (same unit as the budget)."""

    name: str
    limit: float
    value: float

    @property
    def excess(self) -> float:
        """How far over, as a share of the limit."""
        return self.value / self.limit - 1


@dataclass(frozen=True)
class Choice:
    """The winner, or, if nothing meets the budgets, the nearest miss and the budgets that it is over.

    ``reachable`` gives each budget's least value among all outcomes: what that budget alone would allow.
    """

    winner: Outcome | None
    nearest: Outcome
    misses: tuple[Miss, ...] = ()
    reachable: Mapping[str, float] | None = None

    def required(self) -> Outcome:
        """The winner. Raises ``InfeasibleError`` naming the budgets that bind if there is none."""
        if self.winner is not None:
            return self.winner
        over = ", ".join(
            f"{m.name} = {m.value:.6g} against a budget of {m.limit:.6g} ({m.excess:+.1%})"
            for m in self.misses
        )
        raise InfeasibleError(
            f"no evaluated sub-network meets the budgets; the nearest has {over}. "
            f"Raise {' and '.join(f'{m.name} to at least {m.value:.6g}' for m in self.misses)}, or allow "
            "smaller sub-networks"
        )


Tied = Callable[[Outcome, Outcome], bool]
"""Whether an outcome is as accurate as the best one, as far as the items tell."""


def choose_winner(
    outcomes: Sequence[Outcome], budgets: Mapping[str, float], tied: Tied | None = None
) -> Choice:
    """The best accuracy within all ``budgets`` (upper limits by the values' names).

    A tie is what ``tied`` calls one: unless given, an accuracy whose interval overlaps the best one's.
    The smaller wins it, then the faster, then the more accurate; but never one that another is no worse
    than in accuracy, bytes and every budgeted value, and better in one. Raises ``InfeasibleError`` if no
    outcome has an accuracy and every budgeted value.
    """
    known = [o for o in outcomes if o.knows(("accuracy", *budgets))]
    if not known:
        raise InfeasibleError(
            "no sub-network was evaluated successfully: see the failures in the ledger, then run again"
        )
    within = [o for o in known if not _misses(o, budgets)]
    if within:
        best = max(within, key=lambda o: o.values["accuracy"])
        winner = min((o for o in within if o is best or (tied or _ties)(o, best)), key=_tie_order)
        winner = _undominated(winner, within, budgets)
        return Choice(winner, winner)
    nearest = min(known, key=lambda o: (max(m.excess for m in _misses(o, budgets)), *_tie_order(o)))
    reachable = {name: min(o.values[name] for o in known) for name in budgets}
    return Choice(None, nearest, _misses(nearest, budgets), reachable)


def pareto_front(problem: Problem, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes within all budgets that no other of them dominates, the smallest first."""
    unique = {(o.subnet, o.free): o for o in problem.comparable(outcomes)}
    candidates = list(unique.values())
    if not candidates:
        return []
    kept = nondominated(np.array([problem.costs(o) for o in candidates]))
    return sorted((candidates[i] for i in kept), key=lambda o: problem.size(o.subnet))


def nondominated(costs: Costs) -> NDArray[np.intp]:
    """Rows of ``costs`` (n, objectives), all minimised, that no other row dominates."""
    found: NDArray[np.intp] = NonDominatedSorting().do(costs, only_non_dominated_front=True)
    return found


def hypervolume(costs: Costs, reference: Sequence[float]) -> float:
    """Volume dominated by ``costs`` (n, objectives), all minimised, up to the reference point."""
    point = np.asarray(reference, dtype=np.float64)
    inside = costs[np.all(costs < point, axis=1)] if len(costs) else costs
    return float(HV(ref_point=point)(inside)) if len(inside) else 0.0


def _misses(outcome: Outcome, budgets: Mapping[str, float]) -> tuple[Miss, ...]:
    over = (Miss(name, limit, outcome.values[name]) for name, limit in budgets.items())
    return tuple(sorted((m for m in over if m.value > m.limit), key=lambda m: -m.excess))


def dominates(one: Outcome, other: Outcome, names: Sequence[str]) -> bool:
    """Whether ``one`` is no worse in accuracy and in each of ``names``, all costs, and better in one."""
    gains = [one.values["accuracy"] - other.values["accuracy"]]
    gains += [other.values[name] - one.values[name] for name in names]
    return min(gains) >= 0 < max(gains)


def _undominated(winner: Outcome, outcomes: Sequence[Outcome], budgets: Mapping[str, float]) -> Outcome:
    """The winner, or what dominates it and is itself dominated by nothing."""
    names = [name for name in ("weight_bytes", *budgets) if all(name in o.values for o in outcomes)]
    while better := [o for o in outcomes if dominates(o, winner, names)]:
        winner = min(better, key=_tie_order)
    return winner


def _ties(outcome: Outcome, best: Outcome) -> bool:
    high = outcome.values.get("accuracy_high", outcome.values["accuracy"])
    return high >= best.values.get("accuracy_low", best.values["accuracy"])


def _tie_order(outcome: Outcome) -> tuple[float, float, float, str]:
    values = outcome.values
    return (
        values.get("weight_bytes", 0.0),
        -values.get("throughput_tok_s", 0.0),
        -values["accuracy"],
        outcome.subnet.digest,
    )
