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
FOLDS_TO_COMPARE, FAR_BEHIND = 2, 0.02
"""After so many folds, a kind whose Kendall tau lies so far behind the best one's is given up."""


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
        spread = GaussianProcess().fit(features, scaled)
        makers = {**KINDS, "gp": lambda: GaussianProcess(spread.kernel)}
        quality = _choose(features, scaled, {kind: makers[kind] for kind in kinds})
        model: Regressor = spread
        if quality.kind != "gp":
            model = KINDS[quality.kind]()
            model.fit(features, scaled)
    in_units = Quality(quality.kind, quality.kendall_tau, quality.rmse * scale, len(targets))
    return Predictor(in_units, model, spread, mean, scale)


def rank_correlation(predicted: Array, actual: Array) -> float:
    """Kendall's tau-b; 0 where either side is constant or too short to rank."""
    if len(actual) < 2:
        return 0.0
    tau = float(kendalltau(predicted, actual).statistic)
    return 0.0 if math.isnan(tau) else tau


def _choose(features: Array, scaled: Array, makers: Mapping[str, Callable[[], Regressor]]) -> Quality:
    """Quality of the kind that ranks best; boosting is tried last, since it may be given up half-way."""
    kinds = sorted(makers, key=lambda kind: kind == "gbm")
    if len(scaled) < FEWEST_FOR_CHOICE:
        return Quality(kinds[0], 0.0, 1.0, len(scaled))
    if len(scaled) < FEWEST_FOR_BOOSTING and len(kinds) > 1:
        kinds = [kind for kind in kinds if kind != "gbm"]
    best: tuple[Quality, Array] | None = None
    for kind in kinds:
        predicted = _cross_predicted(makers[kind], features, scaled, None if best is None else best[1])
        if predicted is not None:
            rmse = float(np.sqrt(np.mean((predicted - scaled) ** 2)))
            quality = Quality(kind, rank_correlation(predicted, scaled), rmse, len(scaled))
            if best is None or _merit(quality) > _merit(best[0]):
                best = quality, predicted
    assert best is not None
    return best[0]


def _merit(quality: Quality) -> tuple[float, float]:
    return round(quality.kendall_tau, 3), -quality.rmse


def _cross_predicted(
    make: Callable[[], Regressor], features: Array, scaled: Array, rival: Array | None
) -> Array | None:
    """(n,) values, each by a model that did not see it; None once ``rival`` values rank far better.

    Folds interleave the samples in the order of their targets, so that each spans the range.
    """
    order = np.argsort(scaled, kind="stable")
    predicted = np.empty_like(scaled)
    done = np.zeros(len(scaled), dtype=bool)
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        rest = np.setdiff1d(np.arange(len(scaled)), held)
        model = make()
        model.fit(features[rest], scaled[rest])
        predicted[held] = model.predict(features[held])
        done[held] = True
        if rival is not None and fold + 1 == FOLDS_TO_COMPARE:
            ours, theirs = (rank_correlation(values[done], scaled[done]) for values in (predicted, rival))
            if ours < theirs - FAR_BEHIND:
                return None
    return predicted
