"""The search algorithms by the names of ``compress search --algorithm``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compressor.errors import InputError
from compressor.search.baselines import Nsga2Search, RandomSearch
from compressor.search.linas import Linas
from compressor.search.problem import Problem
from compressor.search.published import PublishedLinas
from compressor.search.rounds import RoundSearch

ALGORITHMS: Mapping[str, Callable[[Problem, int], RoundSearch]] = {
    "linas": Linas,
    "published": PublishedLinas,
    "nsga2": Nsga2Search,
    "random": RandomSearch,
}


def make_search(algorithm: str, problem: Problem, seed: int = 0) -> RoundSearch:
    """A search by name. Raises ``InputError`` for an unknown name, ``InfeasibleError`` for budgets that
    no sub-network of the space meets."""
    if algorithm not in ALGORITHMS:
        raise InputError(f"unknown algorithm '{algorithm}': use one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm](problem, seed)
