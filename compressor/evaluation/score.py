"""Scores: an accuracy with its interval, the items behind it, and paired tests between two of them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

CONFIDENCE_Z = 1.959963984540054
"""Two-sided 95% of the standard normal distribution."""


@dataclass(frozen=True)
class Score:
    """An accuracy in [0, 1] with its standard error and 95% interval over ``n`` scored items.

    ``items`` is ``Items.pack()``: enough to repeat intervals and paired tests without a model.
    """

    value: float
    stderr: float
    low: float
    high: float
    n: int
    items: bytes = field(repr=False, default=b"")

    def metrics(self, name: str = "accuracy") -> dict[str, float]:
        """The figures alone, for the ledger."""
        return {
            name: self.value,
            f"{name}_stderr": self.stderr,
            f"{name}_low": self.low,
            f"{name}_high": self.high,
            f"{name}_items": float(self.n),
        }


@dataclass(frozen=True)
class Items:
    """Per-item results of one evaluation.

    ``values`` float[n]: 0 or 1 for a right or wrong item, or a share in [0, 1] of ``counts[i]``
    correlated decisions (the tokens of one sequence). ``strata`` int[n] indexes ``names``; a stratum
    (a task) weighs ``weights[s]`` in the mean and its items weigh equally, by ``counts``.
    ``loglikelihoods`` float32: the choices' log-likelihoods of all items in a row, in nats, and
    ``choices`` int[n] how many belong to each item (all 0 where a task has no choices).
    """

    values: Floats
    names: tuple[str, ...] = ("items",)
    strata: NDArray[np.integer] | None = None
    weights: tuple[float, ...] = ()
    counts: NDArray[np.integer] | None = None
    loglikelihoods: Floats | None = None
    choices: NDArray[np.integer] | None = None

    def pack(self) -> bytes:
        """Compressed bytes, a few per item."""
        arrays = {
            "values": _narrow_values(self.values),
            "strata": None if self.strata is None else self.strata.astype("<u2"),
            "counts": None if self.counts is None else self.counts.astype("<u4"),
            "loglikelihoods": None if self.loglikelihoods is None else self.loglikelihoods.astype("<f4"),
            "choices": None if self.choices is None else self.choices.astype("<u2"),
        }
        present = {name: array for name, array in arrays.items() if array is not None}
        header = {
            "names": self.names,
            "weights": self.weights,
            "arrays": {name: [array.dtype.str, array.size] for name, array in present.items()},
        }
        body = json.dumps(header).encode() + b"\n" + b"".join(a.tobytes() for a in present.values())
        return zlib.compress(body, 6)

    @classmethod
    def unpack(cls, data: bytes) -> Items:
        """What ``pack`` wrote."""
        head, _, body = zlib.decompress(data).partition(b"\n")
        header = json.loads(head)
        arrays: dict[str, NDArray[Any]] = {}
        offset = 0
        for name, (dtype, size) in header["arrays"].items():
            arrays[name] = np.frombuffer(body, dtype, size, offset)
            offset += arrays[name].nbytes
        values = arrays.pop("values").astype(np.float64)
        return cls(values, tuple(header["names"]), weights=tuple(header["weights"]), **arrays)

    def score(self) -> Score:
        """Weighted mean over strata with its standard error and interval."""
        value, variance, total = 0.0, 0.0, 0
        for stratum, weight in enumerate(self.shares()):
            values, counts = self.of(stratum)
            mean, stderr = clustered_mean(values, counts)
            value += weight * mean
            variance += (weight * stderr) ** 2
            total += int(counts.sum())
        stderr = math.sqrt(variance)
        value = min(1.0, max(0.0, value))
        low, high = interval(value, stderr, len(self.values))
        return Score(value, stderr, low, high, total, self.pack())

    def shares(self) -> tuple[float, ...]:
        """Each stratum's weight in the mean; they sum to 1."""
        weights = self.weights or (1.0,) * len(self.names)
        return tuple(w / sum(weights) for w in weights)

    def of(self, stratum: int) -> tuple[Floats, NDArray[np.integer]]:
        """Values and counts of one stratum's items."""
        counts = np.ones(len(self.values), np.int64) if self.counts is None else self.counts
        if self.strata is None:
            return self.values, counts
        mine = self.strata == stratum
        return self.values[mine], counts[mine]


def clustered_mean(values: Floats, counts: NDArray[np.integer]) -> tuple[float, float]:
    """Mean of decisions that come in clusters, and its standard error.

    ``values[i]`` is the share of right decisions among the ``counts[i]`` of cluster i. The ratio
    estimator's linearised variance with clusters as the sampling unit (Cochran, Sampling Techniques,
    section 9A): tokens of one sequence are correlated and must not count as independent. A single
    cluster tells nothing of the spread: its standard error is the largest possible, 0.5.
    """
    n = len(values)
    weights = counts / counts.sum()
    mean = float((values * counts).sum() / counts.sum())
    if n < 2:
        return mean, 0.5
    residuals = weights * (values - mean)
    return mean, math.sqrt(n / (n - 1) * float(residuals @ residuals))


def interval(value: float, stderr: float, n: int) -> tuple[float, float]:
    """95% Wilson interval of a proportion whose standard error is known to be ``stderr``.

    The effective number of items is what would give that standard error under independence; at 0
    and 1, where that tells nothing, it is ``n``, the number of independent items.
    """
    variance = value * (1 - value)
    effective = variance / stderr**2 if stderr > 1e-9 and variance > 0 else float(n)
    z2 = CONFIDENCE_Z**2
    centre = (value + z2 / (2 * effective)) / (1 + z2 / effective)
    spread = math.sqrt(variance / effective + z2 / (4 * effective**2))
    half = CONFIDENCE_Z / (1 + z2 / effective) * spread
    return min(value, max(0.0, centre - half)), max(value, min(1.0, centre + half))


def mcnemar(items_a: bytes, items_b: bytes) -> float:
    """Two-sided exact p-value that two networks are right equally often, on the same items.

    McNemar's test in its exact binomial form. Raises ``ValueError`` where the items are not the same
    or not simply right or wrong.
    """
    a, b = _paired(items_a, items_b)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("McNemar's test needs items that are right or wrong; use sign_test for shares")
    return _binomial_p(int((a > b).sum()), int((a < b).sum()))


def sign_test(items_a: bytes, items_b: bytes) -> float:
    """Two-sided exact sign test over items with shares (sequences); equals ``mcnemar`` on 0/1 items."""
    a, b = _paired(items_a, items_b)
    return _binomial_p(int((a > b).sum()), int((a < b).sum()))


def paired_difference(items_a: bytes, items_b: bytes) -> tuple[float, float]:
    """Mean of a - b over the same items, weighted as in their scores, and its standard error."""
    first, second = Items.unpack(items_a), Items.unpack(items_b)
    _paired(items_a, items_b)
    value, variance = 0.0, 0.0
    for stratum, weight in enumerate(first.shares()):
        values_a, counts = first.of(stratum)
        values_b, _ = second.of(stratum)
        mean, stderr = clustered_mean(values_a - values_b, counts)
        value += weight * mean
        variance += (weight * stderr) ** 2
    return value, math.sqrt(variance)


def _paired(items_a: bytes, items_b: bytes) -> tuple[Floats, Floats]:
    a, b = Items.unpack(items_a), Items.unpack(items_b)
    same_strata = np.array_equal(_or_empty(a.strata), _or_empty(b.strata))
    if len(a.values) != len(b.values) or a.names != b.names or not same_strata:
        raise ValueError("a paired test needs both networks' results on the same items")
    return a.values, b.values


def _or_empty(array: NDArray[np.integer] | None) -> NDArray[np.integer] | Sequence[int]:
    return () if array is None else array


def _binomial_p(wins: int, losses: int) -> float:
    from scipy.stats import binomtest

    if wins + losses == 0:
        return 1.0
    return float(binomtest(wins, wins + losses, 0.5).pvalue)


def _narrow_values(values: Floats) -> NDArray[np.generic]:
    """0/1 values in a byte each, shares in four."""
    return values.astype("u1") if np.isin(values, (0, 1)).all() else values.astype("<f4")
