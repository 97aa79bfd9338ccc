"""What is asked next is what should add most to the hypervolume."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.search.acquisition import improvements, pick
from compressor.search.evolution import Guesses
from compressor.search.front import hypervolume

REFERENCE = np.array([1.1, 1.1])


def guesses(costs, violations=None) -> Guesses:
    costs = np.array(costs, dtype=float)
    missed = np.zeros((len(costs), 1)) if violations is None else np.array(violations, dtype=float)[:, None]
    return Guesses(np.arange(len(costs))[:, None], costs, missed)


def choose(candidates: Guesses, front, count=1, deviations=None):
    deviations = np.zeros_like(candidates.costs) if deviations is None else np.array(deviations, dtype=float)
    scale = np.array([[0.0, 0.0], [1.0, 1.0]])
    front = np.array(front, dtype=float).reshape(-1, 2)
    return list(pick(candidates, deviations, front, scale, count, np.random.default_rng(0)))


@pytest.mark.parametrize("size", [0, 1, 5, 30])
def test_fast_improvements_in_two_dimensions_agree_with_the_definition(size):
    rng = np.random.default_rng(size)
    front, points = rng.uniform(0, 1.3, size=(size, 2)), rng.uniform(-0.2, 1.3, size=(40, 2))
    before = hypervolume(front, REFERENCE)
    expected = [hypervolume(np.vstack([front, p[None]]), REFERENCE) - before for p in points]
    assert improvements(points, front, REFERENCE) == pytest.approx(np.array(expected))


def test_the_largest_improvement_comes_first():
    front = [(0.0, 1.0), (1.0, 0.0)]
    assert choose(guesses([(0.9, 0.9), (0.3, 0.3), (0.5, 0.5)]), front) == [1]


def test_a_batch_spreads_over_the_front_instead_of_crowding_its_best_spot():
    front = [(0.0, 1.0), (1.0, 0.0)]
    candidates = guesses([(0.30, 0.30), (0.31, 0.30), (0.1, 0.7), (0.7, 0.1)])
    assert sorted(choose(candidates, front, 3)) == [0, 2, 3]


def test_without_any_improvement_the_nearest_to_the_front_come_first():
    front = [(0.0, 0.5), (0.5, 0.0)]
    assert choose(guesses([(0.9, 0.9), (0.6, 0.6), (0.5, 0.51)]), front, 2) == [2, 1]


def test_those_predicted_over_a_limit_come_last_the_nearest_first():
    candidates = guesses([(0.1, 0.1), (0.2, 0.2), (0.9, 0.9)], [0.5, 0.1, 0.0])
    assert choose(candidates, [], 3) == [2, 1, 0]


def test_expected_improvement_prefers_the_uncertain_of_two_equals():
    front = [(0.5, 0.5)]
    candidates = guesses([(0.5, 0.5), (0.5, 0.5)])
    assert choose(candidates, front, 1, [[0.0, 0.0], [0.2, 0.0]]) == [1]


def test_more_than_there_are_gives_all_of_them_once():
    assert sorted(choose(guesses([(0.1, 0.2), (0.2, 0.1)]), [], 9)) == [0, 1]
