"""Predicting TTFT and TPOT from a handful of measurements, with a stated error.

A step's time is a sum over layers, so it is linear in three figures of a sub-network: its heads (one),
its layers and its neurons, each counted apart for 8 and for 4 bits. The coefficients are times and so are
not negative. Fitted by non-negative least squares on relative errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from compressor.space import SearchSpace, SubNetwork

MIN_MEASUREMENTS = 4
SPARE_MEASUREMENTS = 3
"""Measurements of a panel beyond the coefficients that it has to tell, so that its error can be stated."""

_HEAD = {8: 0, 4: 5}
_LAYERS = {8: 1, 4: 3}
"""Where the figures of a head, and of layers, with so many bits stand; a layer's neurons follow it."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SpeedEstimate:
    """Predicted figures; ``error`` is the relative error to expect (90th percentile when left out)."""

    ttft_ms: float
    tpot_ms: float
    error: float

    @property
    def lucky_ttft_ms(self) -> float:
        return self.ttft_ms * max(0.0, 1 - self.error)

    @property
    def lucky_tpot_ms(self) -> float:
        return self.tpot_ms * max(0.0, 1 - self.error)


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
        return estimate.lucky_ttft_ms > ttft_ms or estimate.lucky_tpot_ms > tpot_ms

    def least(
        self, subnet: SubNetwork, bits: Sequence[int], outer_bits: Sequence[int] = (8,)
    ) -> SpeedEstimate:
        """The estimate with every layer in whichever of ``bits`` is fastest for it, the head likewise.

        Never above ``predict`` of the same layers and widths in those bits, and it grows with layers and
        neurons alone, as an exact constraint of a search must.
        """
        ttft, tpot = (
            min(times[_HEAD[choice]] for choice in outer_bits)
            + sum(min(_layer_time(times, width, choice) for choice in bits) for width in subnet.widths)
            for times in (self.ttft, self.tpot)
        )
        return SpeedEstimate(ttft, tpot, self.error)


def panel(space: SearchSpace, allows: Callable[[SubNetwork], bool] = lambda _: True) -> list[SubNetwork]:
    """Six sub-networks (nine where bits differ) that tell every coefficient, of uniform width, if allowed.

    The smallest first, then each time the one that adds most to what the others tell: the determinant
    of the information matrix (D-optimal design, greedily).
    """
    choices = [subnet for subnet in space.uniform_subnetworks() if allows(subnet)]
    if not choices:
        return []
    rows = np.stack([_features(subnet) for subnet in choices])
    rows = rows / np.maximum(rows.max(axis=0), 1.0)
    information = np.outer(rows[0], rows[0]) + 1e-3 * np.eye(rows.shape[1])
    taken = [0]
    size = int(np.count_nonzero(rows.max(axis=0))) + SPARE_MEASUREMENTS
    for _ in range(min(size, len(choices)) - 1):
        left = [i for i in range(len(choices)) if i not in taken]
        gains = [np.linalg.det(information + np.outer(rows[i], rows[i])) for i in left]
        best = left[int(np.argmax(gains))]
        information += np.outer(rows[best], rows[best])
        taken.append(best)
    return [choices[i] for i in taken]


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


def _layer_time(coefficients: Sequence[float], width: int, bits: int) -> float:
    place = _LAYERS[bits]
    return coefficients[place] + coefficients[place + 1] * width


def _features(subnet: SubNetwork) -> Array:
    row = np.zeros(len(_HEAD) + 2 * len(_LAYERS))
    row[_HEAD[subnet.head_bits]] = 1.0
    for width, bits in zip(subnet.widths, subnet.bits, strict=True):
        row[_LAYERS[bits]] += 1
        row[_LAYERS[bits] + 1] += width
    return row


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
