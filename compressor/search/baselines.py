"""What LINAS must beat, with the same ask and tell: random search, and NSGA-II on real evaluations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from compressor.search.evolution import mutated
from compressor.search.genes import Genes, GeneTable
from compressor.search.problem import Outcome, Problem
from compressor.search.rounds import RoundSearch
from compressor.search.sampling import unseen
from compressor.space import SubNetwork

MAX_DRAWS = 2000
"""Genotypes drawn before a round does with those it has."""


class RandomSearch(RoundSearch):
    """Feasible, unseen sub-networks drawn uniformly in genes."""

    def __init__(self, problem: Problem, seed: int = 0, batch: int = 10) -> None:
        super().__init__(problem, seed, batch, batch)
        self._table = GeneTable(problem.space)

    def _plan(self, before: list[Outcome], count: int, rng: np.random.Generator) -> list[SubNetwork]:
        return random_unseen(self.problem, self._table, count, {o.subnet.digest for o in before}, rng)


class Nsga2Search(RoundSearch):
    """NSGA-II (Deb et al., 2002) on real evaluations, a generation a round, duplicates excluded.

    Uniform crossover and a mutation fit for categorical genes; budgets by constraint domination.
    """

    def __init__(self, problem: Problem, seed: int = 0, population: int = 25) -> None:
        super().__init__(problem, seed, population, population)
        self._table = GeneTable(problem.space)

    def _plan(self, before: list[Outcome], count: int, rng: np.random.Generator) -> list[SubNetwork]:
        seen = {o.subnet.digest for o in before}
        known = [o for o in before if o.knows(self.problem.predicted)]
        if len(known) < 2:
            return random_unseen(self.problem, self._table, count, seen, rng)
        parents = [known[i] for i in survivors(self.problem, known, self.first)]
        genes = self._table.encode(o.subnet for o in parents)
        found: dict[str, SubNetwork] = {}
        for _ in range(MAX_DRAWS):
            if len(found) >= count:
                break
            child = self._table.decode(self._offspring(genes, rng))
            if child.digest not in seen and self.problem.allows(child):
                found.setdefault(child.digest, child)
        missing = count - len(found)
        return [*found.values(), *unseen(self.problem, missing, seen | found.keys(), rng)]

    def _offspring(self, ranked: Genes, rng: np.random.Generator) -> NDArray[np.int64]:
        """One child of two winners of binary tournaments; ``ranked`` has the best parents first."""
        mother, father = (ranked[rng.integers(len(ranked), size=2).min()] for _ in range(2))
        mixed = np.where(rng.random(len(mother)) < 0.5, mother, father)
        child = mixed if rng.random() < 0.9 else mother
        mutant = mutated(child[None], self._table.choices, rng)
        return np.asarray(self._table.canonical(mutant)[0])


def random_unseen(
    problem: Problem, table: GeneTable, count: int, seen: set[str], rng: np.random.Generator
) -> list[SubNetwork]:
    """Up to ``count`` feasible, unseen sub-networks uniform in genes; where rare, spread over size."""
    found: dict[str, SubNetwork] = {}
    for row in table.sample(MAX_DRAWS, rng):
        if len(found) >= count:
            return list(found.values())
        subnet = table.decode(row)
        if subnet.digest not in seen and problem.allows(subnet):
            found.setdefault(subnet.digest, subnet)
    return [*found.values(), *unseen(problem, count - len(found), seen | found.keys(), rng)]


def survivors(problem: Problem, outcomes: list[Outcome], count: int) -> list[int]:
    """Indices of the ``count`` best: within limits first, then by rank, then by crowding distance."""
    costs = np.array([problem.costs(o) for o in outcomes])
    missed = np.array(
        [sum(max(0.0, o.values[n] / limit - 1) for n, limit in problem.limits.items()) for o in outcomes]
    )
    order: list[int] = []
    inside = np.flatnonzero(missed <= 0)
    if len(inside):
        crowding = get_crowding_function("cd")
        for front in NonDominatedSorting().do(costs[inside]):
            spread = crowding.do(costs[inside[front]], n_remove=0)
            order.extend(int(i) for i in inside[front][np.argsort(-spread, kind="stable")])
    outside = np.flatnonzero(missed > 0)
    order.extend(int(i) for i in outside[np.argsort(missed[outside], kind="stable")])
    return order[:count]
