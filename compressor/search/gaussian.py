"""A small Gaussian process for a few hundred samples: exact, fast, no optimiser.

Kernel: a linear and a squared-exponential part plus noise. Its three hyperparameters come from a grid
by marginal likelihood (Rasmussen & Williams, 2006, eq. 2.30); one eigendecomposition a kernel serves
every noise level.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_KERNELS = tuple((length, share) for length in (0.5, 1.0, 2.0, 4.0) for share in (0.3, 0.9))
"""Lengths of the squared-exponential part with shares of the linear one."""
_NOISES = np.logspace(-4, 0, 9)


class GaussianProcess:
    """Regression on standardised targets; predicts means and standard deviations (noise left out).

    ``kernel`` is the length and the share of the linear part, chosen in fitting unless given.
    ``typical_deviation`` is what it expects to be off by at a sample left out (eq. 5.12).
    """

    def __init__(self, kernel: tuple[float, float] | None = None) -> None:
        self._candidates = _KERNELS if kernel is None else (kernel,)
        self.kernel = self._candidates[0]

    def fit(self, features: Array, targets: Array) -> GaussianProcess:
        """``features`` (n, columns), ``targets`` (n,) of mean about 0 and deviation about 1."""
        self._center = features.mean(axis=0)
        self._features = features - self._center
        linear, squared = self._parts(self._features)
        self._linear_unit = float(np.diag(linear).mean()) or 1.0
        off_diagonal = squared[~np.eye(len(squared), dtype=bool)]
        self._length_unit = float(np.median(off_diagonal)) if len(off_diagonal) else 1.0
        self._length_unit = self._length_unit or 1.0
        best = -np.inf
        for length, share in self._candidates:
            values, vectors = np.linalg.eigh(self._kernel(linear, squared, length, share))
            projected = vectors.T @ targets
            for noise in _NOISES:
                evidence = _log_evidence(values, projected, noise)
                if evidence > best:
                    best = evidence
                    self.kernel = (length, share)
                    spectrum = np.maximum(values, 0) + noise
                    self._weights = vectors @ (projected / spectrum)
                    self._root = vectors / np.sqrt(spectrum)
        left_out = 1 / (self._root**2).sum(axis=1)
        self.typical_deviation = float(np.sqrt(left_out.mean()))
        return self

    def predict(self, features: Array) -> Array:
        """(n,) posterior means."""
        return np.asarray(self._cross(features) @ self._weights)

    def deviation(self, features: Array) -> Array:
        """(n,) posterior standard deviations of the function itself."""
        moved = features - self._center
        _, share = self.kernel
        own = share * (moved**2).sum(axis=1) / self._linear_unit + (1 - share)
        explained = ((self._cross(features) @ self._root) ** 2).sum(axis=1)
        return np.asarray(np.sqrt(np.maximum(own - explained, 1e-12)))

    def _cross(self, features: Array) -> Array:
        linear, squared = self._parts(features - self._center)
        return self._kernel(linear, squared, *self.kernel)

    def _parts(self, moved: Array) -> tuple[Array, Array]:
        """Inner products and squared distances to the samples, (n, samples) each."""
        linear = moved @ self._features.T
        norms = (moved**2).sum(axis=1)[:, None] + (self._features**2).sum(axis=1)[None, :]
        return linear, np.maximum(norms - 2 * linear, 0.0)

    def _kernel(self, linear: Array, squared: Array, length: float, share: float) -> Array:
        smooth = np.exp(-squared / (2 * self._length_unit * length**2))
        return np.asarray(share * linear / self._linear_unit + (1 - share) * smooth)


def _log_evidence(values: Array, projected: Array, noise: float) -> float:
    spectrum = np.maximum(values, 0) + noise
    return float(-0.5 * (projected**2 / spectrum).sum() - 0.5 * np.log(spectrum).sum())
