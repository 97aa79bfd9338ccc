"""Predicting TTFT and TPOT from a handful of measurements, with a stated error.

A step's time is a sum over layers, so it is linear in five figures of a sub-network: one, its layers
and its neurons, the latter two counted apart for 8 and for 4 bits. The coefficients are times and so
are not negative. Fitted by non-negative least squares on relative errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from compressor.space import SearchSpace, SubNetwork

MIN_MEASUREMENTS = 4
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SpeedEstimate:
    """Predicted figures; ``error`` is the relative error to expect (90th percentile when left out)."""

    ttft_ms: float
    tpot_ms: float
    error: float


@dataclass(frozen=True)
class SpeedModel:
    """Fitted coefficients of one engine, device and workload. Make it with ``fit_speed``."""

    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    error: float
    measurements: int

    def predict(self, subnet: SubNetwork) -> SpeedEstimate:
        """The figures that measuring would give, to about ``error``."""
        row = _features(subnet)
        return SpeedEstimate(float(row @ np.array(self.ttft)), float(row @ np.array(self.tpot)), self.error)

    def surely_over(self, subnet: SubNetwork, ttft_ms: float, tpot_ms: float) -> bool:
        """Whether even the lucky end of the estimate breaks a limit."""
        estimate = self.predict(subnet)
        lucky = 1 - self.error
        return estimate.ttft_ms * lucky > ttft_ms or estimate.tpot_ms * lucky > tpot_ms


def panel(space: SearchSpace) -> list[SubNetwork]:
    """About six sub-networks that tell every coefficient: corners of the space and its middle."""
    depths, widths, bits = space.depths, space.widths, space.bits
    corners = [
        space.uniform(depth, width, bits[-1])
        for depth in (depths[-1], depths[0])
        for width in (widths[-1], widths[0])
    ]
    middle = space.uniform(depths[len(depths) // 2], widths[len(widths) // 2], bits[-1])
    few_bits = [space.uniform(d, w, bits[0]) for d, w in ((depths[-1], widths[-1]), (depths[0], widths[0]))]
    return list(dict.fromkeys([*corners, middle, *few_bits]))


def fit_speed(
    subnets: Sequence[SubNetwork], ttft_ms: Sequence[float], tpot_ms: Sequence[float]
) -> SpeedModel | None:
    """The model of these measurements, or None where they are too few (under ``MIN_MEASUREMENTS``)."""
    if len(set(subnets)) < MIN_MEASUREMENTS:
        return None
    rows = np.stack([_features(subnet) for subnet in subnets])
    coefficients, errors = [], []
    for values in (np.asarray(ttft_ms, float), np.asarray(tpot_ms, float)):
        coefficients.append(tuple(_fit(rows, values)))
        errors += _left_out_errors(rows, values)
    return SpeedModel(coefficients[0], coefficients[1], float(np.quantile(errors, 0.9)), len(subnets))


def _features(subnet: SubNetwork) -> Array:
    eight = [width for width, bits in zip(subnet.widths, subnet.bits, strict=True) if bits == 8]
    four = [width for width, bits in zip(subnet.widths, subnet.bits, strict=True) if bits == 4]
    return np.array([1.0, len(eight), sum(eight), len(four), sum(four)])


def _fit(rows: Array, values: Array) -> Array:
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    solution, _ = nnls(rows / scale / values[:, None], np.ones(len(values)))
    return np.asarray(solution / scale)


def _left_out_errors(rows: Array, values: Array) -> list[float]:
    """Relative error on each measurement of a model fitted to the others."""
    errors = []
    for i in range(len(values)):
        rest = np.arange(len(values)) != i
        predicted = rows[i] @ _fit(rows[rest], values[rest])
        errors.append(abs(predicted / values[i] - 1))
    return errors
