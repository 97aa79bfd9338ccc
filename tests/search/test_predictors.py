"""Predictors rank sub-networks that they have not seen, know how sure they are, and are quick."""

from __future__ import annotations

import time

import numpy as np
import pytest

from compressor.search.gaussian import GaussianProcess
from compressor.search.genes import GeneTable
from compressor.search.predictors import KINDS, fit_predictor, rank_correlation
from tests.search.synthetic import SPACE, evaluate

TABLE = GeneTable(SPACE)


def samples(count: int, seed: int, name: str = "accuracy"):
    genes = TABLE.sample(count, np.random.default_rng(seed))
    values = np.array([evaluate(TABLE.decode(row)).values[name] for row in genes])
    return TABLE.features(genes), values


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_ranks_unseen_subnetworks(kind):
    predictor = fit_predictor(*samples(80, 0), kinds=(kind,))
    features, values = samples(200, 1)
    assert rank_correlation(predictor.predict(features), values) > 0.7


def test_the_choice_is_no_worse_than_any_kind_in_cross_validation():
    data = samples(60, 0)
    chosen = fit_predictor(*data).quality
    others = [fit_predictor(*data, kinds=(kind,)).quality for kind in KINDS]
    assert chosen.kendall_tau == max(q.kendall_tau for q in others) and chosen.samples == 60


def test_uncertainty_is_smaller_at_what_was_seen_and_of_the_size_of_the_error():
    features, values = samples(60, 0)
    predictor = fit_predictor(features, values)
    new_features, new_values = samples(200, 1)
    assert predictor.deviation(features).mean() < predictor.deviation(new_features).mean()
    error = np.abs(predictor.predict(new_features) - new_values)
    assert (error < 3 * predictor.deviation(new_features)).mean() > 0.9


@pytest.mark.parametrize("count", [1, 2, 6, 12])
def test_a_constant_value_is_predicted_as_such(count):
    features, _ = samples(count, 0)
    predictor = fit_predictor(features, np.full(count, 0.25))
    assert predictor.predict(features) == pytest.approx(np.full(count, 0.25))
    assert predictor.quality.kendall_tau == 0
    assert np.all(np.isfinite(predictor.deviation(features)))


def test_fitting_twice_gives_the_same_predictions():
    features, values = samples(50, 0)
    new, _ = samples(20, 1)
    first, second = (fit_predictor(features, values).predict(new) for _ in range(2))
    assert np.array_equal(first, second)


def test_the_process_interpolates_a_smooth_function():
    rng = np.random.default_rng(0)
    inputs, new = rng.uniform(-2, 2, size=(80, 2)), rng.uniform(-1.8, 1.8, size=(50, 2))

    def function(x):
        return np.sin(2 * x[:, 0]) + 0.5 * x[:, 1]

    process = GaussianProcess().fit(inputs, function(inputs))
    assert np.abs(process.predict(new) - function(new)).max() < 0.15
    far = np.full((1, 2), 9.0)
    assert process.deviation(far)[0] > 3 * process.deviation(new).mean()


def test_thousands_are_predicted_in_a_moment():
    features, values = samples(250, 0)
    predictor = fit_predictor(features, values)
    new, _ = samples(5000, 1, "tpot_ms")
    began = time.perf_counter()
    predictor.predict(new)
    assert time.perf_counter() - began < 2.0


def test_what_the_process_expects_at_left_out_samples_is_what_it_would_expect_at_new_ones():
    """Measured where it was fitted, it would be far too sure, and every new candidate seem a wonder."""
    features, values = samples(60, 0)
    scaled = (values - values.mean()) / values.std()
    process = GaussianProcess().fit(features, scaled)
    new, _ = samples(100, 1)
    assert 0.5 < np.sqrt((process.deviation(new) ** 2).mean()) / process.typical_deviation < 2
