"""What a search is asked: the space, its objectives, its budgets, and what an evaluation answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from compressor.errors import InfeasibleError
from compressor.space import SearchSpace, SubNetwork, parameter_count

Figure = Callable[[SubNetwork], float]
"""A figure of a sub-network that is computed exactly, without evaluating it."""


@dataclass(frozen=True)
class Objective:
    """One axis of the front, by its name in ``Outcome.values``."""

    name: str
    maximize: bool = False

    def cost(self, value: float) -> float:
        """The value as something to minimise."""
        return -value if self.maximize else value


@dataclass(frozen=True)
class Outcome:
    """What evaluating a sub-network gave: figures by name. ``infeasible``: evaluated, but over a budget.
    ``free``: with the unpruned model's own weights, which anybody has without a search."""

    subnet: SubNetwork
    values: Mapping[str, float]
    status: Literal["ok", "failed", "infeasible"] = "ok"
    free: bool = False

    def knows(self, names: Sequence[str]) -> bool:
        """Whether it has a finite value for every name, so that it can be compared and learnt from."""
        return self.status != "failed" and all(math.isfinite(self.values.get(n, math.nan)) for n in names)


@dataclass(frozen=True)
class ExactConstraint:
    """An upper limit on a figure that is computed, such as bytes; nothing over it is ever asked.

    The figure must not grow when a layer, neurons or bits are taken away. ``unit`` and ``scale`` say how
    messages write it: ``unit="MiB", scale=2**20`` for a figure in bytes.
    """

    name: str
    figure: Figure
    limit: float
    unit: str = ""
    scale: float = 1.0

    def written(self, value: float) -> str:
        """The value in ``unit``, rounded up to three decimals so that it can be given as a budget."""
        return f"{math.ceil(value / self.scale * 1000) / 1000:.12g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Problem:
    """A search's question.

    ``exact`` holds the objectives that are computed (``weight_bytes``); every other objective comes from
    ``Outcome.values`` and is predicted. ``limits`` are upper limits on measured values (``ttft_ms``,
    ``tpot_ms``): predicted before an evaluation, checked after it.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    exact: Mapping[str, Figure] = field(default_factory=dict)
    constraints: tuple[ExactConstraint, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [objective.name for objective in self.objectives]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"a search needs two or three different objectives, not {names}")

    @property
    def predicted(self) -> tuple[str, ...]:
        """Names of the values that only an evaluation tells: objectives first, then limited ones."""
        learnt = [o.name for o in self.objectives if o.name not in self.exact]
        return (*learnt, *(name for name in self.limits if name not in learnt))

    def allows(self, subnet: SubNetwork) -> bool:
        """Whether every exact constraint holds."""
        return all(c.figure(subnet) <= c.limit for c in self.constraints)

    def meets_limits(self, outcome: Outcome) -> bool:
        """Whether an evaluated sub-network is within every budget, exact or measured."""
        within = all(outcome.values.get(n, math.inf) <= limit for n, limit in self.limits.items())
        return within and self.allows(outcome.subnet)

    def size(self, subnet: SubNetwork) -> float:
        """The figure by which populations are spread: the first exact objective, else parameters."""
        for objective in self.objectives:
            if objective.name in self.exact:
                return self.exact[objective.name](subnet)
        return parameter_count(self.space.shape, subnet)

    def costs(self, outcome: Outcome) -> list[float]:
        """The outcome's objectives, each as something to minimise."""
        return [
            o.cost(self.exact[o.name](outcome.subnet) if o.name in self.exact else outcome.values[o.name])
            for o in self.objectives
        ]

    def comparable(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Those with every value known and every budget met: what a front is made of."""
        return [o for o in outcomes if o.knows(self.predicted) and self.meets_limits(o)]


class Search(Protocol):
    """What every algorithm offers. It keeps no state but what it was told: replaying a ledger's outcomes
    in order and asking again gives the same question."""

    def ask(self, n: int = 1) -> list[SubNetwork]:
        """Up to ``n`` sub-networks to evaluate next; empty when nothing is left to try."""

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """What evaluations answered, in the order they were paid for."""


def check_feasible(problem: Problem) -> None:
    """Raise ``InfeasibleError``, naming the budget and the least that would do, if nothing meets it."""
    for constraint in problem.constraints:
        least = min(constraint.figure(s) for s in _smallest_of_each_depth(problem.space))
        if least > constraint.limit:
            written = constraint.written
            raise InfeasibleError(
                f"no sub-network meets the {constraint.name} budget of {written(constraint.limit)}: "
                f"the smallest needs {written(least)}, {written(least - constraint.limit)} more. "
                f"Raise the budget to at least {written(least)}, or allow fewer layers or narrower widths"
            )
    if not any(problem.allows(s) for s in _smallest_of_each_depth(problem.space)):
        names = " and ".join(c.name for c in problem.constraints)
        raise InfeasibleError(
            f"each of the budgets {names} can be met, but not all at once: raise one of them"
        )


def _smallest_of_each_depth(space: SearchSpace) -> list[SubNetwork]:
    return [
        space.uniform(depth, space.widths[0], space.bits[0], space.outer_bits[0]) for depth in space.depths
    ]
