"""Cheap stand-ins for evaluations: regressors on genes, the best ranker chosen by cross-validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.svm import SVR

from compressor.search.gaussian import GaussianProcess

Array = NDArray[np.float64]

FOLDS = 5
FEWEST_FOR_CHOICE = 10
"""Samples below which cross-validation says too little: ridge is taken as it is."""
FEWEST_FOR_BOOSTING = 40
"""Samples below which boosting, the slowest to fit, has never ranked best."""


class Regressor(Protocol):
    """scikit-learn's two verbs, on standardised targets."""

    def fit(self, features: Array, targets: Array) -> object: ...

    def predict(self, features: Array) -> Array: ...


def _ridge() -> Regressor:
    model: Regressor = RidgeCV(alphas=np.logspace(-3, 3, 13))
    return model


def _svr() -> Regressor:
    model: Regressor = SVR(kernel="rbf", C=10.0, epsilon=0.05, gamma="scale")
    return model


def _boosting() -> Regressor:
    model: Regressor = GradientBoostingRegressor(
        n_estimators=50, max_depth=3, learning_rate=0.15, subsample=0.8, max_features=0.5, random_state=0
    )
    return model


def _process() -> Regressor:
    return GaussianProcess()


KINDS: Mapping[str, Callable[[], Regressor]] = {
    "ridge": _ridge,
    "svr": _svr,
    "gbm": _boosting,
    "gp": _process,
}


@dataclass(frozen=True)
class Quality:
    """How well a predictor ranks sub-networks that it was not fitted on (cross-validated)."""

    kind: str
    kendall_tau: float
    rmse: float
    samples: int


class Predictor:
    """Predicts one value from gene features, with its uncertainty."""

    def __init__(
        self, quality: Quality, model: Regressor, spread: GaussianProcess, mean: float, scale: float
    ):
        self.quality = quality
        self._model = model
        self._spread = spread
        self._mean = mean
        self._scale = scale

    def predict(self, features: Array) -> Array:
        """(n,) expected values."""
        return self._model.predict(features) * self._scale + self._mean

    def deviation(self, features: Array) -> Array:
        """(n,) standard deviations: the process's, scaled to the errors made in cross-validation."""
        relative = self._spread.deviation(features)
        return np.asarray(relative / self._spread.typical_deviation * max(self.quality.rmse, 1e-12))


def fit_predictor(features: Array, targets: Array, kinds: tuple[str, ...] = tuple(KINDS)) -> Predictor:
    """The kind that ranks best in cross-validation, fitted on all samples.

    ``features`` (n, columns), ``targets`` (n,), finite. Deterministic in its arguments, order included.
    """
    mean, scale = float(targets.mean()), float(targets.std()) or 1.0
    scaled = (targets - mean) / scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quality = _choose(features, scaled, kinds)
        model = KINDS[quality.kind]()
        model.fit(features, scaled)
    spread = model if isinstance(model, GaussianProcess) else GaussianProcess().fit(features, scaled)
    in_units = Quality(quality.kind, quality.kendall_tau, quality.rmse * scale, len(targets))
    return Predictor(in_units, model, spread, mean, scale)


def rank_correlation(predicted: Array, actual: Array) -> float:
    """Kendall's tau-b; 0 where either side is constant or too short to rank."""
    if len(actual) < 2:
        return 0.0
    tau = float(kendalltau(predicted, actual).statistic)
    return 0.0 if math.isnan(tau) else tau


def _choose(features: Array, scaled: Array, kinds: tuple[str, ...]) -> Quality:
    if len(scaled) < FEWEST_FOR_CHOICE:
        return Quality(kinds[0], 0.0, 1.0, len(scaled))
    if len(scaled) < FEWEST_FOR_BOOSTING and len(kinds) > 1:
        kinds = tuple(kind for kind in kinds if kind != "gbm")
    tried = [_cross_validated(kind, features, scaled) for kind in kinds]
    return max(tried, key=lambda q: (round(q.kendall_tau, 3), -q.rmse))


def _cross_validated(kind: str, features: Array, scaled: Array) -> Quality:
    """Folds interleave the samples in the order of their targets, so that each spans the range."""
    order = np.argsort(scaled, kind="stable")
    predicted = np.empty_like(scaled)
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        rest = np.setdiff1d(np.arange(len(scaled)), held)
        model = KINDS[kind]()
        model.fit(features[rest], scaled[rest])
        predicted[held] = model.predict(features[held])
    rmse = float(np.sqrt(np.mean((predicted - scaled) ** 2)))
    return Quality(kind, rank_correlation(predicted, scaled), rmse, len(scaled))
