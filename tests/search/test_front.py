"""The answer is the front of what was evaluated, and a winner by a rule one can check by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import InfeasibleError
from compressor.search.front import choose_winner, dominates, hypervolume, nondominated, pareto_front
from compressor.search.problem import Outcome
from compressor.space import SubNetwork
from tests.search.synthetic import SPACE, evaluate, make_problem

BUDGETS = {"memory_bytes": 100.0, "tpot_ms": 10.0}
COSTS = st.lists(st.tuples(*[st.integers(0, 9).map(float)] * 2), min_size=1, max_size=12).map(np.array)


def outcome(
    number: int, accuracy: float, spread: float = 0.0, size: float = 50, tpot: float = 5, **values: float
):
    return Outcome(
        SubNetwork((0,), (number,)),
        {
            "accuracy": accuracy,
            "accuracy_low": accuracy - spread,
            "accuracy_high": accuracy + spread,
            "weight_bytes": size,
            "memory_bytes": size * 1.5,
            "tpot_ms": tpot,
        }
        | values,
    )


def test_the_best_accuracy_within_all_budgets_wins():
    outcomes = [outcome(1, 0.9, size=80), outcome(2, 0.8, tpot=11), outcome(3, 0.7), outcome(4, 0.6)]
    assert choose_winner(outcomes, BUDGETS).required() == outcomes[2]


def test_overlapping_intervals_tie_and_the_smaller_wins():
    outcomes = [
        outcome(1, 0.80, 0.02, size=60),
        outcome(2, 0.77, 0.02, size=40),
        outcome(3, 0.75, 0.02, size=30),
    ]
    assert choose_winner(outcomes, BUDGETS).winner == outcomes[1]


def test_among_equal_sizes_the_faster_wins_then_the_more_accurate():
    slow, fast = (outcome(n, 0.8, 0.01, throughput_tok_s=speed) for n, speed in [(1, 90.0), (2, 100.0)])
    better = outcome(3, 0.805, 0.01, throughput_tok_s=100.0)
    assert choose_winner([slow, fast], BUDGETS).winner == fast
    assert choose_winner([slow, fast, better], BUDGETS).winner == better


def test_the_order_of_outcomes_does_not_matter():
    outcomes = [outcome(n, 0.8, 0.01) for n in range(1, 5)]
    winners = {
        choose_winner(list(order), BUDGETS).winner.subnet for order in itertools.permutations(outcomes)
    }
    assert len(winners) == 1


def test_without_a_winner_the_nearest_is_named_with_what_binds():
    outcomes = [outcome(1, 0.9, size=80, tpot=10.5), outcome(2, 0.5, tpot=12), outcome(3, 0.4, tpot=30)]
    choice = choose_winner(outcomes, BUDGETS)
    assert choice.winner is None
    assert choice.nearest == outcomes[0 if 80 * 1.5 / 100 < 1.2 else 1]
    assert [(m.name, m.limit, m.value) for m in choice.misses] == [("tpot_ms", 10.0, 12)]
    assert choice.reachable == {"memory_bytes": 75.0, "tpot_ms": 10.5}
    with pytest.raises(InfeasibleError, match=r"tpot_ms = 12 against a budget of 10 \(\+20\.0%\)"):
        choice.required()


def test_failed_and_unmeasured_outcomes_never_win():
    failed = Outcome(SubNetwork((0,), (1,)), outcome(1, 1.0).values, "failed")
    unmeasured = Outcome(SubNetwork((0,), (2,)), {"accuracy": 1.0})
    assert choose_winner([failed, unmeasured, outcome(3, 0.1)], BUDGETS).winner == outcome(3, 0.1)
    with pytest.raises(InfeasibleError, match="no sub-network was evaluated"):
        choose_winner([failed, unmeasured], BUDGETS)


@given(COSTS)
def test_the_front_is_exactly_what_nothing_dominates(costs):
    def dominated(i):
        return any(np.all(c <= costs[i]) and np.any(c < costs[i]) for c in costs)

    assert set(nondominated(costs)) == {i for i in range(len(costs)) if not dominated(i)}


@given(COSTS)
def test_hypervolume_is_the_area_counted_in_squares(costs):
    squares = sum(
        bool(np.any(np.all(costs <= corner, axis=1))) for corner in itertools.product(range(10), range(10))
    )
    assert hypervolume(costs, [10, 10]) == pytest.approx(squares)


def test_hypervolume_of_nothing_inside_is_zero():
    assert hypervolume(np.array([[2.0, 0.0]]), [1, 1]) == 0
    assert hypervolume(np.empty((0, 2)), [1, 1]) == 0


def test_the_front_holds_evaluated_feasible_outcomes_once_the_smallest_first():
    rng = np.random.default_rng(0)
    outcomes = [evaluate(SPACE.sample(rng)) for _ in range(40)]
    problem = make_problem(budget_share=0.85)
    front = pareto_front(problem, outcomes + outcomes)
    sizes = [o.values["weight_bytes"] for o in front]
    accuracies = [o.values["accuracy"] for o in front]
    assert sizes == sorted(set(sizes)) and accuracies == sorted(accuracies)
    assert all(problem.allows(o.subnet) and o in outcomes for o in front)
    assert pareto_front(problem, []) == []


def test_a_tie_may_be_judged_by_paired_items() -> None:
    outcomes = [outcome(1, 0.70, size=100), outcome(2, 0.69, size=50)]
    assert choose_winner(outcomes, {}, lambda _one, _best: True).required() is outcomes[1]
    assert choose_winner(outcomes, {}, lambda _one, _best: False).required() is outcomes[0]


FIGURES = st.tuples(*[st.integers(1, 6).map(float)] * 4)


@given(
    searched=st.lists(FIGURES, max_size=8),
    free=st.lists(FIGURES, min_size=1, max_size=3),
    spread=st.sampled_from([0.0, 0.15, 0.4]),
)
def test_no_winner_and_no_front_is_dominated_by_what_is_free(searched, free, spread):
    """Whatever was measured of sub-networks and of the unpruned model's own forms."""
    outcomes = [
        replace(
            outcome(n, accuracy / 10, spread, size, tpot, memory_bytes=memory), free=number >= len(searched)
        )
        for number, (n, (accuracy, size, tpot, memory)) in enumerate(enumerate([*searched, *free], 1))
    ]
    budgets = {"memory_bytes": 5.0, "tpot_ms": 5.0}
    names = ("weight_bytes", *budgets)
    choice = choose_winner(outcomes, budgets)
    within = [o for o in outcomes if all(o.values[name] <= limit for name, limit in budgets.items())]
    assert (choice.winner is None) == (not within)
    if choice.winner is not None:
        assert not any(dominates(o, choice.winner, names) for o in within)


def test_what_is_free_wins_where_nothing_is_better():
    free = replace(outcome(1, 0.8, size=40), free=True)
    worse = outcome(2, 0.79, size=41)
    assert choose_winner([worse, free], BUDGETS).required() is free
    better = outcome(3, 0.9, size=40)
    assert choose_winner([worse, free, better], BUDGETS).required() is better


def test_the_same_architecture_with_other_weights_is_another_point_of_the_front():
    problem = make_problem()
    tuned = evaluate(SPACE.full)
    free = replace(tuned, values={**tuned.values, "accuracy": tuned.values["accuracy"] / 2}, free=True)
    assert pareto_front(problem, [free, tuned]) == [tuned]
    assert pareto_front(problem, [tuned, free]) == [tuned]
