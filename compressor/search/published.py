"""LINAS as published, for comparison: the rounds, predictors and operators of Intel's DyNAS-T.

Source: arXiv 2205.10358 and the DyNAS-T code of its authors. Populations of 50; each round fits a ridge
and an RBF-SVR a value, keeps the one of lower cross-validated error, runs NSGA-II with integer SBX and
polynomial mutation on the predictions, and evaluates the final population. Two courtesies, so that the
comparison is about the method: budgets hold here as well, and an evaluation that the published code
would repeat goes to a random new sub-network instead. Sizes are exact.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, cross_val_score
from sklearn.svm import SVR

from compressor.search.baselines import random_unseen
from compressor.search.evolution import Guess, Guesses, PredictedProblem
from compressor.search.genes import Genes, GeneTable
from compressor.search.problem import Outcome, Problem
from compressor.search.rounds import RoundSearch
from compressor.space import SubNetwork

GENERATIONS = 100
"""Of 50 predictions each: the lower end of what DyNAS-T's examples use."""


class PublishedLinas(RoundSearch):
    """LINAS with its authors' operators and schedule."""

    def __init__(self, problem: Problem, seed: int = 0, population: int = 50) -> None:
        super().__init__(problem, seed, population, population)
        self._table = GeneTable(problem.space)

    def _plan(self, before: list[Outcome], count: int, rng: np.random.Generator) -> list[SubNetwork]:
        seen = {o.subnet.digest for o in before}
        known = [o for o in before if o.knows(self.problem.predicted)]
        if len(known) < 10:
            return random_unseen(self.problem, self._table, count, seen, rng)
        final = self._final_population(known, rng)
        distinct = {s.digest: s for s in map(self._table.decode, final)}
        fresh = [s for s in distinct.values() if s.digest not in seen and self.problem.allows(s)][:count]
        seen = seen | {s.digest for s in fresh}
        return [*fresh, *random_unseen(self.problem, self._table, count - len(fresh), seen, rng)]

    def _final_population(self, known: list[Outcome], rng: np.random.Generator) -> Genes:
        genes = self._table.encode(o.subnet for o in known)
        models = {
            name: _better_of_two(genes, np.array([o.values[name] for o in known]))
            for name in self.problem.predicted
        }
        problem = PredictedProblem(self._table, self._guess(models), len(self.problem.objectives))
        algorithm = NSGA2(
            pop_size=self.first,
            sampling=self._table.sample(self.first, rng),
            crossover=SBX(prob=0.9, eta=15, vtype=float, repair=RoundingRepair()),
            mutation=PM(prob=1.0, eta=20, vtype=float, repair=RoundingRepair()),
            eliminate_duplicates=True,
        )
        algorithm.setup(
            problem, seed=int(rng.integers(2**31)), termination=("n_gen", GENERATIONS), verbose=False
        )
        while algorithm.has_next():
            algorithm.next()
        return self._table.canonical(np.asarray(algorithm.pop.get("X"), dtype=np.int64))

    def _guess(self, models: dict[str, Ridge | SVR]) -> Guess:
        def guess(genes: Genes) -> Guesses:
            subnets = [self._table.decode(row) for row in genes]
            predicted = {name: model.predict(genes) for name, model in models.items()}
            exact = {n: np.array([f(s) for s in subnets]) for n, f in self.problem.exact.items()}
            costs = [o.cost(1.0) * (exact | predicted)[o.name] for o in self.problem.objectives]
            over = [np.array([c.figure(s) / c.limit - 1 for s in subnets]) for c in self.problem.constraints]
            over += [predicted[name] / limit - 1 for name, limit in self.problem.limits.items()]
            violations = np.stack(over, axis=1) if over else np.empty((len(genes), 0))
            return Guesses(genes, np.stack(costs, axis=1), violations)

        return guess


def _better_of_two(genes: Genes, targets: NDArray[np.float64]) -> Ridge | SVR:
    """Ridge or RBF-SVR on raw genes, whichever has the lower cross-validated error, fitted on all."""
    scale = float(targets.std()) or 1.0
    candidates = (
        Ridge(alpha=1.0),
        SVR(kernel="rbf", gamma="auto", C=20.0 * scale, epsilon=0.01 * scale),
    )
    folds = KFold(5, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = [
            -cross_val_score(m, genes, targets, cv=folds, scoring="neg_mean_squared_error").mean()
            for m in candidates
        ]
    best = candidates[int(np.argmin(errors))]
    best.fit(genes, targets)
    return best
