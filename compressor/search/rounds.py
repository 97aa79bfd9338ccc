"""Ask and tell in rounds: each round's questions follow from the seed and the outcomes before it alone.

So a search keeps no state worth saving: replaying the ledger's outcomes in order and asking again
gives the same question, whether or not the run was killed in the middle of a round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from compressor.search.problem import Outcome, Problem, check_feasible
from compressor.space import SubNetwork


class RoundSearch(ABC):
    """Base of the algorithms. ``first`` sub-networks make the first round, ``batch`` every later one."""

    def __init__(self, problem: Problem, seed: int = 0, first: int = 20, batch: int = 8) -> None:
        """Raises ``InfeasibleError`` if no sub-network of the space meets the exact constraints."""
        check_feasible(problem)
        self.problem = problem
        self.seed = seed
        self.first = first
        self.batch = batch
        self._told: dict[str, Outcome] = {}
        self._plans: dict[int, list[SubNetwork]] = {}

    @property
    def told(self) -> list[Outcome]:
        """The outcomes so far, in the order they were told."""
        return list(self._told.values())

    def ask(self, n: int = 1) -> list[SubNetwork]:
        """Up to ``n`` sub-networks of the current round, never one that was told before.

        Asking again before telling gives the same answer. Fewer than ``n`` come at the end of a round:
        tell first. Empty means that nothing is left to try.
        """
        return self._pending()[:n]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Outcomes in the order they were paid for. Those outside the space or told before are ignored."""
        for outcome in outcomes:
            if self.problem.space.contains(outcome.subnet):
                self._told.setdefault(outcome.subnet.digest, outcome)

    @abstractmethod
    def _plan(self, before: list[Outcome], count: int, rng: np.random.Generator) -> list[SubNetwork]:
        """Up to ``count`` new, distinct, feasible sub-networks, given all outcomes before this round.

        ``before`` is in a canonical order. An empty plan ends the search.
        """

    def _pending(self) -> list[SubNetwork]:
        start = self._round_start(len(self._told))
        while True:
            plan = self._planned(start)
            left = [s for s in plan if s.digest not in self._told]
            if left or not plan:
                return left
            start += len(plan)

    def _planned(self, start: int) -> list[SubNetwork]:
        if start not in self._plans:
            before = sorted(self.told[:start], key=lambda o: o.subnet.digest)
            count = self._round_start(start, following=True) - start
            rng = np.random.default_rng([self.seed, start])
            given = [] if start else self._free()[:count]
            planned = self._plan(before, count, rng)
            digests = {subnet.digest for subnet in given}
            rest = [subnet for subnet in planned if subnet.digest not in digests]
            self._plans[start] = [*given, *rest][:count]
        return self._plans[start]

    def _free(self) -> list[SubNetwork]:
        """What every search begins with: the whole model in each number of bits that constraints allow."""
        space = self.problem.space
        return [s for s in space.free if space.contains(s) and self.problem.allows(s)]

    def _round_start(self, told: int, following: bool = False) -> int:
        """Outcomes before the round that holds outcome number ``told``, or before the round after it."""
        if told < self.first:
            return self.first if following else 0
        rounds = (told - self.first) // self.batch + following
        return self.first + rounds * self.batch
