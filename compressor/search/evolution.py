"""NSGA-II on predictions: thousands of guesses in about a second, sizes exact, budgets as constraints.

Operators fit categorical genes: uniform crossover, and a mutation that always moves a gene to another
value (rounding a polynomial mutation never flips a gene of two values).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem as PymooProblem
from pymoo.core.repair import Repair
from pymoo.operators.crossover.ux import UX
from pymoo.util.ref_dirs import get_reference_directions

from compressor.search.genes import Genes, GeneTable, keys

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Guesses:
    """Predicted candidates: ``genes`` (n, genes), ``costs`` (n, objectives) minimised, ``violations``
    (n, constraints), positive where a budget is missed."""

    genes: Genes
    costs: Array
    violations: Array

    def take(self, rows: NDArray[Any]) -> Guesses:
        return Guesses(self.genes[rows], self.costs[rows], self.violations[rows])


Guess = Callable[[Genes], Guesses]


def evolve(
    table: GeneTable,
    guess: Guess,
    start: Genes,
    objectives: int,
    rng: np.random.Generator,
    population: int = 50,
    generations: int = 25,
) -> Guesses:
    """Every distinct candidate that an evolution from ``start`` looked at, in the order it was met.

    NSGA-II for two objectives, NSGA-III (Das-Dennis directions) for three.
    """
    log = _Log(guess)
    operators = {
        "sampling": _filled_up(table, start, population, rng),
        "crossover": UX(),
        "mutation": ChoiceMutation(table),
        "repair": CanonicalRepair(table),
        "eliminate_duplicates": True,
    }
    algorithm = _algorithm(objectives, population, operators)
    problem = PredictedProblem(table, log, objectives)
    algorithm.setup(problem, seed=int(rng.integers(2**31)), termination=("n_gen", generations), verbose=False)
    while algorithm.has_next():
        algorithm.next()
    return log.everything()


class ChoiceMutation(Mutation):  # type: ignore[misc]
    """Moves each gene with probability ``1 / genes`` (at least one of them) to a different value."""

    def __init__(self, table: GeneTable) -> None:
        super().__init__(prob=1.0)
        self._choices = table.choices

    def _do(self, problem: Any, X: Genes, *_: Any, random_state: Any = None, **__: Any) -> Genes:  # noqa: ARG002, N803
        return mutated(X, self._choices, random_state)


class CanonicalRepair(Repair):  # type: ignore[misc]
    """Gives every offspring its canonical genotype, so that equal architectures are seen as equal."""

    def __init__(self, table: GeneTable) -> None:
        super().__init__()
        self._table = table

    def _do(self, problem: Any, X: Genes, **_: Any) -> Genes:  # noqa: ARG002, N803
        return self._table.canonical(np.asarray(X, dtype=np.int64))


class PredictedProblem(PymooProblem):  # type: ignore[misc]
    """pymoo's view of the guesses: objectives to minimise, constraints met at or below 0."""

    def __init__(self, table: GeneTable, guess: Guess, objectives: int) -> None:
        constraints = guess(table.encode([table.space.smallest])).violations.shape[1]
        super().__init__(
            n_var=len(table.choices),
            n_obj=objectives,
            n_ieq_constr=constraints,
            xl=np.zeros_like(table.choices),
            xu=table.choices - 1,
            vtype=int,
        )
        self._guess = guess

    def _evaluate(self, x: Genes, out: dict[str, Any], *_: Any, **__: Any) -> None:
        guesses = self._guess(np.asarray(x, dtype=np.int64))
        out["F"] = guesses.costs
        if guesses.violations.shape[1]:
            out["G"] = guesses.violations


def mutated(genes: Genes, choices: Genes, rng: np.random.Generator) -> Genes:
    """Each row with one gene or more moved to another of its values; genes of one value stay."""
    free = np.flatnonzero(choices > 1)
    if not len(free):
        return genes.copy()
    moves = rng.random((len(genes), len(free))) < 1 / len(free)
    moves[np.arange(len(genes)), rng.integers(len(free), size=len(genes))] = True
    steps = rng.integers(1, choices[free], size=(len(genes), len(free)))
    found = np.array(genes, dtype=np.int64)
    found[:, free] = np.where(moves, (found[:, free] + steps) % choices[free], found[:, free])
    return found


class _Log:
    """Remembers every candidate that was guessed."""

    def __init__(self, guess: Guess) -> None:
        self._guess = guess
        self._parts: list[Guesses] = []

    def __call__(self, genes: Genes) -> Guesses:
        guesses = self._guess(genes)
        self._parts.append(guesses)
        return guesses

    def everything(self) -> Guesses:
        genes, costs, violations = (
            np.concatenate([getattr(part, name) for part in self._parts])
            for name in ("genes", "costs", "violations")
        )
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys(genes)):
            first.setdefault(key, row)
        return Guesses(genes, costs, violations).take(np.array(list(first.values()), dtype=np.int64))


def _algorithm(objectives: int, population: int, operators: dict[str, Any]) -> Any:
    if objectives == 2:
        return NSGA2(pop_size=population, **operators)
    directions = get_reference_directions("das-dennis", objectives, n_partitions=12 if objectives == 3 else 6)
    return NSGA3(ref_dirs=directions, pop_size=max(population, len(directions)), **operators)


def _filled_up(table: GeneTable, start: Genes, population: int, rng: np.random.Generator) -> Genes:
    """The start with its mutants, as many as the population needs."""
    rows = [start[:population]]
    missing = population - len(rows[0])
    if missing > 0 and len(start):
        parents = start[rng.integers(len(start), size=missing)]
        rows.append(table.canonical(mutated(parents, table.choices, rng)))
    elif missing > 0:
        rows.append(table.sample(missing, rng))
    return np.concatenate(rows)
