"""Scores, their intervals and paired tests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from compressor.evaluation.score import Items, interval, mcnemar, paired_difference, sign_test


def test_accuracy_has_the_wilson_interval() -> None:
    values = np.array([1.0] * 30 + [0.0] * 10)
    score = Items(values).score()
    # The standard error uses n - 1, Wilson's n: with 40 items they differ in the third digit.
    exact = binomtest(30, 40).proportion_ci(method="wilson")
    assert score.value == 0.75
    assert score.low == pytest.approx(exact.low, abs=0.003)
    assert score.high == pytest.approx(exact.high, abs=0.003)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_perfect_or_hopeless_score_still_has_a_width(value: float) -> None:
    score = Items(np.full(20, value)).score()
    assert score.value == value
    assert score.high - score.low == pytest.approx(1 - 1 / (1 + 1.96**2 / 20), abs=0.01)


def test_correlated_tokens_of_a_sequence_do_not_narrow_the_interval() -> None:
    shares = np.array([0.0, 1.0] * 8)
    by_sequence = Items(shares, counts=np.full(16, 100)).score()
    as_tokens = Items(np.repeat(shares, 100)).score()
    assert by_sequence.n == as_tokens.n == 1600
    assert by_sequence.high - by_sequence.low > 8 * (as_tokens.high - as_tokens.low)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        score = Items((rng.random(60) < 0.7).astype(float)).score()
        covered += score.low <= 0.7 <= score.high
    assert 0.92 <= covered / 400 <= 0.98


def test_tasks_weigh_as_told_whatever_their_sizes() -> None:
    values = np.array([1.0] * 90 + [0.0] * 10)
    strata = np.array([0] * 90 + [1] * 10)
    assert Items(values, ("a", "b"), strata).score().value == pytest.approx(0.5)
    assert Items(values, ("a", "b"), strata, weights=(9.0, 1.0)).score().value == pytest.approx(0.9)


@given(
    st.lists(st.booleans(), min_size=1, max_size=50),
    st.integers(1, 5),
)
def test_items_survive_packing(right: list[bool], choices: int) -> None:
    n = len(right)
    items = Items(
        np.array(right, float),
        ("a",),
        np.zeros(n, np.int64),
        (1.0,),
        loglikelihoods=-np.arange(n * choices, dtype=np.float32),
        choices=np.full(n, choices),
    )
    again = Items.unpack(items.pack())
    assert np.array_equal(again.values, items.values)
    assert again.loglikelihoods is not None and np.array_equal(again.loglikelihoods, items.loglikelihoods)
    assert again.choices is not None and again.choices.sum() == n * choices
    assert again.score() == items.score()


def test_items_take_a_few_bytes_each() -> None:
    rng = np.random.default_rng(0)
    items = Items(
        (rng.random(500) < 0.5).astype(float),
        loglikelihoods=rng.normal(-10, 3, 2000).astype(np.float32),
        choices=np.full(500, 4),
    )
    assert len(items.pack()) < 500 * 4 * 4.5


def test_mcnemar_looks_only_at_items_that_differ() -> None:
    a = np.array([1] * 50 + [1] * 12 + [0] * 3 + [0] * 35, float)
    b = np.array([1] * 50 + [0] * 12 + [1] * 3 + [0] * 35, float)
    assert mcnemar(Items(a).pack(), Items(b).pack()) == pytest.approx(binomtest(12, 15).pvalue)
    assert mcnemar(Items(a).pack(), Items(a).pack()) == 1.0


def test_mcnemar_refuses_other_items_and_shares() -> None:
    with pytest.raises(ValueError, match="same items"):
        mcnemar(Items(np.ones(3)).pack(), Items(np.ones(4)).pack())
    with pytest.raises(ValueError, match="right or wrong"):
        mcnemar(Items(np.array([0.5, 1])).pack(), Items(np.ones(2)).pack())


def test_sign_test_works_on_shares() -> None:
    a, b = np.linspace(0.5, 0.9, 12), np.linspace(0.4, 0.8, 12)
    assert sign_test(Items(a).pack(), Items(b).pack()) == pytest.approx(2 * 0.5**12)


def test_a_paired_difference_is_tighter_than_two_intervals() -> None:
    rng = np.random.default_rng(1)
    a = (rng.random(400) < 0.6).astype(float)
    b = np.where(rng.random(400) < 0.05, 1 - a, a)
    difference, stderr = paired_difference(Items(a).pack(), Items(b).pack())
    assert difference == pytest.approx((a - b).mean())
    assert stderr < Items(a).score().stderr


def test_interval_stays_within_bounds() -> None:
    low, high = interval(0.99, 0.02, 40)
    assert 0 <= low < 0.99 < high <= 1
