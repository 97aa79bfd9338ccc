"""LINAS within budgets: real evaluations train predictors, NSGA-II on them proposes what to evaluate.

Source: LINAS (Cummings et al., arXiv 2205.10358), as LLaMA-NAS uses it (arXiv 2405.18377). Ours asks in
small rounds, knows sizes exactly, holds budgets as constraints and never asks the same twice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from compressor.search.acquisition import pick
from compressor.search.evolution import Guesses, evolve
from compressor.search.genes import Genes, GeneTable, keys
from compressor.search.predictors import Predictor, Quality, fit_predictor
from compressor.search.problem import Outcome, Problem
from compressor.search.rounds import RoundSearch
from compressor.search.sampling import first_population, unseen
from compressor.space import SubNetwork

Acquisition = Literal["front", "ehvi"]
Array = NDArray[np.float64]

FEWEST_TO_LEARN = 6
"""Outcomes with known values below which a round is sampled rather than predicted."""
SMALL_SPACE = 4096
"""Encodings up to which every sub-network is predicted, rather than evolved towards."""
FAR_DEVIATIONS = 2.0
"""A limit missed by the prediction even this many deviations lower is missed for sure."""


@dataclass(frozen=True)
class Round:
    """What a round of learning was: predictor quality by value name, and its cost."""

    evaluations: int
    quality: dict[str, Quality]
    seconds: float


class Linas(RoundSearch):
    """The search of LLaMA-NAS with budgets. ``rounds`` records each round that was planned here."""

    def __init__(
        self,
        problem: Problem,
        seed: int = 0,
        first: int = 20,
        batch: int = 8,
        acquisition: Acquisition = "front",
    ) -> None:
        """Raises ``InfeasibleError`` if no sub-network of the space meets the exact constraints."""
        super().__init__(problem, seed, first, batch)
        self.acquisition = acquisition
        self.rounds: list[Round] = []
        self._table = GeneTable(problem.space)
        self._exact: dict[bytes, tuple[list[float], list[float]]] = {}

    def _plan(self, before: list[Outcome], count: int, rng: np.random.Generator) -> list[SubNetwork]:
        seen = {o.subnet.digest for o in before}
        if not before:
            return first_population(self.problem, count, rng)
        learnable = [o for o in before if o.knows(self.problem.predicted)]
        if len(learnable) < FEWEST_TO_LEARN:
            return unseen(self.problem, count, seen, rng)
        began = time.perf_counter()
        with threadpool_limits(1):
            predictors = self._learn(learnable)
            guesses = self._search(predictors, learnable, rng)
            fresh = self._askable(predictors, guesses, before)
            chosen = self._pick(predictors, fresh, learnable, count, rng)
        quality = {name: p.quality for name, p in predictors.items()}
        self.rounds.append(Round(len(before), quality, time.perf_counter() - began))
        return [self._table.decode(row) for row in chosen]

    def _learn(self, outcomes: list[Outcome]) -> dict[str, Predictor]:
        features = self._table.features(self._table.encode(o.subnet for o in outcomes))
        return {
            name: fit_predictor(features, np.array([o.values[name] for o in outcomes]))
            for name in self.problem.predicted
        }

    def _search(
        self, predictors: dict[str, Predictor], outcomes: list[Outcome], rng: np.random.Generator
    ) -> Guesses:
        """Everything worth a look: the whole of a small space, else what an evolution met."""

        def guess(genes: Genes) -> Guesses:
            return self._guess(predictors, genes)

        if self.problem.space.num_encodings <= SMALL_SPACE:
            return guess(self._table.everything())
        evaluated = guess(self._table.encode(o.subnet for o in outcomes))
        start = evaluated.take(_best_first(evaluated))
        return evolve(self._table, guess, start.genes[:25], len(self.problem.objectives), rng)

    def _guess(self, predictors: dict[str, Predictor], genes: Genes) -> Guesses:
        features = self._table.features(genes)
        predicted = {name: p.predict(features) for name, p in predictors.items()}
        figures, violations = self._exactly(genes)
        exact_names = list(self.problem.exact)
        costs = [
            np.asarray(
                o.cost(1.0)
                * (figures[:, exact_names.index(o.name)] if o.name in exact_names else predicted[o.name])
            )
            for o in self.problem.objectives
        ]
        over = [predicted[name] / limit - 1 for name, limit in self.problem.limits.items()]
        return Guesses(genes, np.stack(costs, axis=1), np.column_stack([violations, *over]))

    def _exactly(self, genes: Genes) -> tuple[Array, Array]:
        """Exact figures (n, exact) and relative violations of exact constraints (n, constraints)."""
        found = []
        for row, key in zip(genes, keys(genes), strict=True):
            if key not in self._exact:
                subnet = self._table.decode(row)
                self._exact[key] = (
                    [figure(subnet) for figure in self.problem.exact.values()],
                    [c.figure(subnet) / c.limit - 1 for c in self.problem.constraints],
                )
            found.append(self._exact[key])
        figures, violations = zip(*found, strict=True)
        return np.array(figures, dtype=np.float64), np.array(violations, dtype=np.float64)

    def _askable(self, predictors: dict[str, Predictor], guesses: Guesses, before: list[Outcome]) -> Guesses:
        """The unseen ones within every exact budget and not predicted far over a measured one."""
        known = set(keys(self._table.encode(o.subnet for o in before)))
        good = np.array([key not in known for key in keys(guesses.genes)])
        exact = len(self.problem.constraints)
        good &= np.all(guesses.violations[:, :exact] <= 0, axis=1)
        features = self._table.features(guesses.genes)
        for column, (name, limit) in enumerate(self.problem.limits.items()):
            slack = FAR_DEVIATIONS * predictors[name].deviation(features) / limit
            good &= guesses.violations[:, exact + column] <= slack
        return guesses.take(np.flatnonzero(good))

    def _pick(
        self,
        predictors: dict[str, Predictor],
        fresh: Guesses,
        outcomes: list[Outcome],
        count: int,
        rng: np.random.Generator,
    ) -> Genes:
        inside = self.problem.comparable(outcomes)
        front = np.array([self.problem.costs(o) for o in inside]).reshape(-1, len(self.problem.objectives))
        scale = np.array([self.problem.costs(o) for o in outcomes])
        deviations = np.zeros_like(fresh.costs)
        if self.acquisition == "ehvi":
            features = self._table.features(fresh.genes)
            for column, objective in enumerate(self.problem.objectives):
                if objective.name in predictors:
                    deviations[:, column] = predictors[objective.name].deviation(features)
        return fresh.genes[pick(fresh, deviations, front, scale, count, rng)]


def _best_first(guesses: Guesses) -> NDArray[np.intp]:
    """Rows by feasibility, then by rank of non-domination."""
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    missed = np.maximum(guesses.violations, 0).sum(axis=1)
    _, rank = NonDominatedSorting().do(guesses.costs, return_rank=True)
    return np.lexsort((rank, missed))
