"""Every algorithm: never a duplicate, never over a budget, and resumable from the outcomes alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compressor.search.algorithms import ALGORITHMS, make_search
from compressor.search.linas import Linas
from compressor.search.problem import Outcome
from compressor.space import SearchSpace
from tests.search.synthetic import MIXED, SHAPE, SPACE, evaluate, make_problem

PROBLEM = make_problem(budget_share=0.85, limits={"tpot_ms": 5.2})


def run(search, evaluations, at_once=1, evaluate=evaluate):
    """Outcomes in order, asking for ``at_once`` at a time."""
    told = []
    while len(told) < evaluations:
        asked = search.ask(min(at_once, evaluations - len(told)))
        if not asked:
            break
        outcomes = [evaluate(s) for s in asked]
        search.tell(outcomes)
        told.extend(outcomes)
    return told


@pytest.fixture(scope="module", params=list(ALGORITHMS))
def finished(request):
    """An algorithm and a run of it that was left alone: past the second round of each."""
    return request.param, run(make_search(request.param, PROBLEM, seed=3), 60)


def test_no_duplicates_and_nothing_over_an_exact_budget(finished):
    _, told = finished
    assert len({o.subnet for o in told}) == len(told) == 60
    assert all(PROBLEM.allows(o.subnet) for o in told)
    assert all(SPACE.decode(SPACE.encode(o.subnet)) == o.subnet for o in told)


@pytest.mark.parametrize("killed_after", [0, 1, 20, 25, 53])
def test_replaying_the_ledger_gives_the_same_next_question(finished, killed_after):
    algorithm, told = finished
    resumed = make_search(algorithm, PROBLEM, seed=3)
    resumed.tell(told[:killed_after])
    assert resumed.ask(1) == [told[killed_after].subnet]


def test_asking_for_many_at_once_asks_the_same_in_the_same_order(finished):
    algorithm, told = finished
    together = run(make_search(algorithm, PROBLEM, seed=3), 60, at_once=7)
    assert [o.subnet for o in together] == [o.subnet for o in told]


def test_outcomes_told_out_of_order_within_a_round_do_not_change_the_next_round(finished):
    algorithm, told = finished
    search = make_search(algorithm, PROBLEM, seed=3)
    first = search.first
    search.tell(list(reversed(told[:first])))
    assert search.ask(1) == [told[first].subnet]


def test_asking_twice_is_asking_once_and_another_seed_asks_something_else():
    search = Linas(PROBLEM, seed=0)
    assert search.ask(5) == search.ask(5)
    assert search.ask(10) != Linas(PROBLEM, seed=1).ask(10)


def test_killed_three_times_and_resumed_ends_with_the_same_outcomes(finished):
    algorithm, told = finished
    ledger: list[Outcome] = []
    for stop in (9, 33, 47, 60):
        search = make_search(algorithm, PROBLEM, seed=3)
        search.tell(ledger)
        ledger.extend(run(search, stop - len(ledger)))
    assert [o.subnet for o in ledger] == [o.subnet for o in told]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_space_is_searched_to_its_last_subnetwork_and_then_ends(algorithm):
    space = SearchSpace(SHAPE, (2, 3, 4), (192, 384))
    told = run(make_search(algorithm, make_problem(space)), 1000, at_once=10)
    assert len(told) == len({o.subnet for o in told})
    assert len(told) == space.num_distinct if algorithm == "linas" else len(told) > 20


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluations_that_fail_are_not_asked_again_and_do_not_stop_the_search(algorithm):
    def failing(subnet):
        good = evaluate(subnet)
        if subnet.widths[0] == 192:
            return Outcome(subnet, {}, "failed")
        return Outcome(subnet, {**good.values, "accuracy": math.nan}) if subnet.depth == 14 else good

    told = run(make_search(algorithm, PROBLEM, seed=0), 60, evaluate=failing)
    assert len({o.subnet for o in told}) == 60


def test_a_search_in_which_everything_fails_goes_on_to_its_budget():
    told = run(Linas(PROBLEM), 40, evaluate=lambda s: Outcome(s, {}, "failed"))
    assert len({o.subnet for o in told}) == 40


@pytest.mark.parametrize("algorithm", ["linas", "nsga2"])
def test_a_constant_objective_is_no_obstacle(algorithm):
    def constant(subnet):
        return Outcome(subnet, {**evaluate(subnet).values, "accuracy": 0.5})

    assert len(run(make_search(algorithm, PROBLEM), 30, evaluate=constant)) == 30


def test_outcomes_from_another_space_are_left_out():
    search = Linas(PROBLEM)
    search.tell([evaluate(MIXED.sample(np.random.default_rng(0)))])
    assert search.told == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_search_begins_with_what_is_free(algorithm):
    space = SearchSpace.from_fractions(SHAPE, [0.75, 1.0], [0.5, 1.0], bits=(4, 8), outer_bits=(4, 8))
    whole = space.free
    assert [(s.bits[0], s.outer[0]) for s in whole] == [(8, 8), (4, 8), (4, 4)]
    told = run(make_search(algorithm, make_problem(space), seed=5), 30)
    assert [o.subnet for o in told[:3]] == list(whole)
    smaller = make_problem(space, budget_share=0.8)
    allowed = [s for s in whole if smaller.allows(s)]
    assert 0 < len(allowed) < 3
    asked = make_search(algorithm, smaller, seed=5).ask(len(allowed))
    assert asked == allowed
    assert len({o.subnet for o in told}) == 30
