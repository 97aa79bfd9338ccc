"""A problem knows what is exact, what is predicted, and whether anything fits at all."""

from __future__ import annotations

import math
import re

import pytest

from compressor.errors import InfeasibleError, InputError
from compressor.search.algorithms import ALGORITHMS, make_search
from compressor.search.problem import ExactConstraint, Objective, Outcome, Problem, check_feasible
from compressor.space import kv_cache_bytes
from tests.search.synthetic import SHAPE, SPACE, evaluate, int8_bytes, make_problem


def test_limited_values_are_predicted_beside_the_objectives():
    problem = make_problem(limits={"tpot_ms": 5.0, "accuracy": 1.0})
    assert problem.predicted == ("accuracy", "tpot_ms")


def test_costs_are_minimised_and_exact_ones_computed():
    outcome = Outcome(SPACE.full, {"accuracy": 0.75})
    assert make_problem().costs(outcome) == [-0.75, int8_bytes(SPACE.full)]


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_an_outcome_without_a_finite_value_is_not_compared(value):
    values = {} if value is None else {"accuracy": value}
    assert make_problem().comparable([Outcome(SPACE.full, values)]) == []


def test_only_outcomes_within_every_budget_are_compared():
    problem = make_problem(budget_share=0.9, limits={"tpot_ms": 4.0})
    inside = Outcome(SPACE.smallest, {"accuracy": 0.1, "tpot_ms": 4.0})
    slow = Outcome(SPACE.smallest, {"accuracy": 0.1, "tpot_ms": 4.1})
    large = Outcome(SPACE.full, {"accuracy": 0.1, "tpot_ms": 1.0})
    failed = Outcome(SPACE.smallest, {"accuracy": 0.1, "tpot_ms": 1.0}, "failed")
    assert problem.comparable([slow, large, failed, inside]) == [inside]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_empty_feasible_set_names_the_budget_and_the_least_that_would_do(algorithm):
    problem = make_problem(budget_share=0.3)
    least = int8_bytes(SPACE.smallest)
    with pytest.raises(InfeasibleError, match="memory budget") as error:
        make_search(algorithm, problem)
    assert "\n" not in str(error.value)
    suggested = float(re.search(r"at least ([\d.]+) MiB", str(error.value))[1]) * 2**20
    make_search(algorithm, make_problem(budget_share=suggested / int8_bytes(SPACE.full)))
    assert suggested < 1.001 * least


def test_a_budget_of_exactly_the_smallest_is_met():
    share = int8_bytes(SPACE.smallest) * (1 + 1e-12) / int8_bytes(SPACE.full)
    search = make_search("linas", make_problem(budget_share=share))
    assert search.ask(5) == [SPACE.smallest]
    search.tell([evaluate(SPACE.smallest)])
    assert search.ask(5) == []


def test_budgets_that_exclude_each_other_are_named_together():
    def more_when_shallow(subnet):
        return -float(kv_cache_bytes(SHAPE, subnet, 10, 1))

    deepest, shallowest = SPACE.uniform(16, 192), SPACE.uniform(12, 192)
    problem = Problem(
        SPACE,
        (Objective("accuracy", True), Objective("weight_bytes")),
        {"weight_bytes": int8_bytes},
        (
            ExactConstraint("bytes", int8_bytes, int8_bytes(shallowest)),
            ExactConstraint("cache", more_when_shallow, more_when_shallow(deepest)),
        ),
    )
    with pytest.raises(InfeasibleError, match="bytes and cache"):
        check_feasible(problem)


def test_an_unknown_algorithm_names_those_there_are():
    with pytest.raises(InputError, match="linas, published, nsga2, random"):
        make_search("magic", make_problem())


def test_one_objective_is_no_front():
    with pytest.raises(ValueError, match="two or three"):
        Problem(SPACE, (Objective("accuracy"),))
