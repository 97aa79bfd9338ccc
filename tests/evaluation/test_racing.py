"""Races stop what is dominated, rarely what is not, and never reorder a front."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.evaluation.racing import Raced, dominance_evidence, run_race, rungs
from compressor.evaluation.score import Items


def race(ours: np.ndarray, *rivals: np.ndarray, seed: int = 0, alpha: float = 0.05) -> Raced:
    return run_race(
        lambda _, items: ours[items],
        lambda: Items(ours),
        [Items(rival).pack() for rival in rivals],
        len(ours),
        seed,
        alpha,
    )


def right(share: float, n: int, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(n) < share).astype(float)


def test_a_clearly_worse_network_stops_early() -> None:
    rng = np.random.default_rng(0)
    raced = race(right(0.3, 400, rng), right(0.6, 400, rng))
    assert raced.dominated_by == 0
    assert raced.evaluated <= 200
    assert raced.score.value < 0.6


def test_equal_networks_are_stopped_at_most_as_often_as_stated() -> None:
    stopped = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        ours = right(0.5, 200, rng)
        rival = rng.permutation(ours)  # as accurate over all items
        stopped += race(ours, rival, seed=seed, alpha=0.1).dominated_by is not None
    assert stopped / 200 <= 0.1


def test_many_rivals_share_the_error() -> None:
    stopped = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        ours = right(0.5, 200, rng)
        rivals = [rng.permutation(ours) for _ in range(10)]
        stopped += race(ours, *rivals, seed=seed, alpha=0.1).dominated_by is not None
    assert stopped / 100 <= 0.1


def test_rivals_that_all_lead_stop_it_sooner_than_one_alone_would_after_sharing_the_error() -> None:
    rng = np.random.default_rng(5)
    ours = right(0.35, 600, rng)
    rivals = [right(0.55, 600, rng) for _ in range(8)]
    assert race(ours, *rivals).evaluated <= 300


def test_a_small_lead_over_many_items_is_found() -> None:
    rng = np.random.default_rng(1)
    rival = right(0.5, 2000, rng)
    ours = np.where(rng.random(2000) < 0.15, 0, rival)  # right on no item that the rival misses
    raced = race(ours, rival)
    assert raced.dominated_by == 0
    assert raced.saved > 0.7


def test_a_lead_that_cannot_be_caught_up_is_certain() -> None:
    assert dominance_evidence(np.ones(6), total=10)[-1] == float("inf")
    assert dominance_evidence(np.ones(4), total=10)[-1] < float("inf")


def test_evidence_needs_a_lead() -> None:
    assert dominance_evidence(np.zeros(50), total=100).max() == 1.0
    assert dominance_evidence(-np.ones(40), total=100).max() < 1.0


def test_a_better_network_is_scored_on_every_item() -> None:
    rng = np.random.default_rng(0)
    ours, rival = right(0.7, 300, rng), right(0.5, 300, rng)
    raced = race(ours, rival)
    assert raced.dominated_by is None
    assert raced.score.value == pytest.approx(ours.mean())
    assert raced.saved == 0


def test_a_network_without_rivals_is_scored_rung_by_rung() -> None:
    asked: list[int] = []

    def evaluate(rung: int, items: np.ndarray) -> np.ndarray:
        asked.append(rung)
        return ours[items]

    ours = right(0.3, 100, np.random.default_rng(8))
    raced = run_race(evaluate, lambda: Items(ours), [], len(ours), looks=4)
    assert asked == [0, 1, 2, 3]
    assert (raced.dominated_by, raced.evaluated, raced.score.value) == (None, 100, ours.mean())


def test_a_stopped_network_stays_below_its_rival() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rival = right(0.55, 300, rng)
        raced = race(right(0.35, 300, rng), rival, seed=seed)
        if raced.dominated_by is not None:
            assert raced.score.value <= rival.mean()


def test_tasks_of_a_mean_are_weighted_in_a_race() -> None:
    """The rival leads on the many items of a task that hardly counts, and loses where it counts."""
    strata = np.array([0] * 380 + [1] * 20)
    ours = np.array([0.0] * 380 + [1.0] * 20)
    rival = Items(1 - ours, ("light", "heavy"), strata, (0.05, 0.95))
    raced = run_race(
        lambda _, items: ours[items],
        lambda: Items(ours, ("light", "heavy"), strata, (0.05, 0.95)),
        [rival.pack()],
        len(ours),
    )
    assert raced.dominated_by is None


def test_the_order_is_fixed_by_the_seed() -> None:
    assert all(np.array_equal(a, b) for a, b in zip(rungs(100, 3), rungs(100, 3), strict=True))
    assert not np.array_equal(rungs(100, 3)[0], rungs(100, 4)[0])
    assert sorted(np.concatenate(rungs(103, 3)).tolist()) == list(range(103))
    assert [len(part) for part in rungs(100, 3, looks=2)] == [50, 50]
