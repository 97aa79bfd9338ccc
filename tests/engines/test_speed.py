"""The speed predictor: right on what it should be right on, and honest about its error."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.engines.speed import fit_speed, panel
from compressor.space import ModelShape, SearchSpace, SubNetwork

SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49152, tie_word_embeddings=True)
SPACE = SearchSpace.from_fractions(SHAPE, (0.75, 0.875, 1.0), (0.5, 0.75, 1.0), bits=(4, 8))


def true_times(subnet: SubNetwork) -> tuple[float, float]:
    """Times of an imagined machine: a head, layers, and neurons that cost less in 4 bits."""
    neurons = sum(w * (0.6 if b == 4 else 1.0) for w, b in zip(subnet.widths, subnet.bits, strict=True))
    return 10 + subnet.depth + neurons / 600, 1.5 + 0.05 * subnet.depth + neurons / 8000


def measured(subnets: list[SubNetwork], noise: float) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(0)
    times = np.array([true_times(s) for s in subnets]) * (1 + noise * rng.standard_normal((len(subnets), 2)))
    return times[:, 0].tolist(), times[:, 1].tolist()


def test_the_panel_is_small_and_within_the_space() -> None:
    subnets = panel(SPACE)
    assert len(subnets) == 8 and len(set(subnets)) == len(subnets)
    assert all(SPACE.contains(s) for s in subnets)
    eight_only = panel(SearchSpace.from_fractions(SHAPE, (0.75, 1.0), (0.5, 1.0)))
    assert len(eight_only) == 4
    three = SearchSpace.from_fractions(SHAPE, (0.75, 0.875, 1.0), (0.5, 0.75, 1.0))
    assert len(panel(three)) == 6


@pytest.mark.parametrize(("noise", "bound"), [(0.0, 0.001), (0.02, 0.07)])
def test_a_panel_predicts_unseen_sub_networks(noise: float, bound: float) -> None:
    subnets = panel(SPACE)
    model = fit_speed(subnets, *measured(subnets, noise))
    assert model is not None
    rng = np.random.default_rng(1)
    for subnet in (SPACE.sample(rng) for _ in range(50)):
        ttft, tpot = true_times(subnet)
        estimate = model.predict(subnet)
        assert estimate.ttft_ms == pytest.approx(ttft, rel=bound)
        assert estimate.tpot_ms == pytest.approx(tpot, rel=bound)


def test_the_stated_error_grows_with_the_noise() -> None:
    rng = np.random.default_rng(2)
    subnets = panel(SPACE) + [SPACE.sample(rng) for _ in range(20)]
    quiet, loud = (fit_speed(subnets, *measured(subnets, noise)) for noise in (0.005, 0.1))
    assert quiet is not None and loud is not None
    assert quiet.error < 0.03 < loud.error


def test_only_the_surely_slow_are_turned_away() -> None:
    subnets = panel(SPACE)
    model = fit_speed(subnets, *measured(subnets, 0.01))
    assert model is not None
    ttft, tpot = true_times(SPACE.full)
    assert model.surely_over(SPACE.full, ttft * 0.5, tpot * 2)
    assert model.surely_over(SPACE.full, ttft * 2, tpot * 0.5)
    assert not model.surely_over(SPACE.full, ttft, tpot)


def test_the_least_estimate_is_a_lower_bound_that_bits_do_not_move() -> None:
    subnets = panel(SPACE)
    model = fit_speed(subnets, *measured(subnets, 0.0))
    assert model is not None
    rng = np.random.default_rng(3)
    for subnet in (SPACE.sample(rng) for _ in range(20)):
        least, all_four = (
            model.least(subnet, (4, 8)),
            SubNetwork(subnet.layers, subnet.widths, (4,) * subnet.depth),
        )
        assert least.tpot_ms <= model.predict(subnet).tpot_ms * (1 + 1e-9)
        assert least.tpot_ms == pytest.approx(model.predict(all_four).tpot_ms)
        assert model.least(all_four, (8, 4)).ttft_ms == pytest.approx(least.ttft_ms)


def test_the_panel_keeps_to_what_is_allowed() -> None:
    allowed = panel(SPACE, lambda subnet: subnet.depth < 30)
    assert len(allowed) == 8 and all(subnet.depth < 30 for subnet in allowed)
    assert panel(SPACE, lambda _: False) == []


def test_too_few_measurements_predict_nothing() -> None:
    assert fit_speed([SPACE.full] * 5, [1.0] * 5, [1.0] * 5) is None
