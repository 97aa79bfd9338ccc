"""First populations are feasible, distinct, spread over size, and hold the extremes."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.search.sampling import first_population, ranked_to, unseen
from tests.search.synthetic import MIXED, SPACE, int8_bytes, make_problem


@pytest.mark.parametrize("space", [SPACE, MIXED])
@pytest.mark.parametrize("share", [1.0, 0.8, 0.65])
def test_first_population_is_feasible_distinct_and_stratified(space, share):
    problem = make_problem(space, share)
    found = first_population(problem, 20, np.random.default_rng(0))
    sizes = sorted(int8_bytes(s) for s in found)
    assert len({s.digest for s in found}) == 20
    assert all(problem.allows(s) for s in found)
    assert sizes[0] == int8_bytes(space.smallest)
    limit = min(problem.constraints[0].limit, int8_bytes(space.full))
    assert sizes[-1] > limit - 0.03 * int8_bytes(space.full)
    gaps = np.diff(sizes) / (sizes[-1] - sizes[0])
    assert gaps.max() < 0.25


def test_uniform_widths_are_in_the_first_population():
    found = first_population(make_problem(), 20, np.random.default_rng(0))
    assert sum(len(set(s.widths)) == 1 for s in found) >= 6


def test_a_small_space_gives_what_it_has():
    space = type(SPACE)(SPACE.shape, (15, 16), (192,))
    found = first_population(make_problem(space), 20, np.random.default_rng(0))
    assert {s.depth for s in found} == {15, 16} and len(found) == 2


def test_unseen_never_repeats():
    problem = make_problem(budget_share=0.8)
    rng = np.random.default_rng(0)
    first = unseen(problem, 30, set(), rng)
    second = unseen(problem, 30, {s.digest for s in first}, np.random.default_rng(0))
    assert not {s.digest for s in first} & {s.digest for s in second}
    assert len(first) == len(second) == 30


@pytest.mark.parametrize(("space", "share"), [(SPACE, 0.75), (MIXED, 0.5)])
def test_layers_that_are_dropped_last_are_the_widest(space, share):
    problem = make_problem(space, 0.8)
    target = share * int8_bytes(space.full)
    found = ranked_to(problem, target, np.random.default_rng(0))
    widths = dict(zip(found.layers, found.widths, strict=True))
    ranked = [widths[layer] for layer in reversed(space.drop_order) if layer in widths]
    assert problem.allows(found) and 0.95 * target < int8_bytes(found) <= target
    assert ranked[0] == space.widths[-1] and ranked[-1] == space.widths[0]
    assert sorted(ranked[:-1], reverse=True)[: len(ranked) // 2] == ranked[: len(ranked) // 2]


def test_no_layer_has_more_bits_before_all_have_their_neurons():
    problem = make_problem(MIXED, 0.8)
    found = ranked_to(problem, 0.75 * int8_bytes(MIXED.full), np.random.default_rng(0))
    assert found.depth == MIXED.depths[-1] and set(found.widths) == {MIXED.widths[-1]}
    bits = dict(zip(found.layers, found.bits, strict=True))
    ranked = [bits[layer] for layer in reversed(MIXED.drop_order)]
    assert ranked == sorted(ranked, reverse=True) and set(ranked) == {4, 8}
