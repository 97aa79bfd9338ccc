"""What torch does to bf16 numbers on a CPU in several passes over memory, done in one.

Norms, gates, rotary embeddings and softmax are a third of a small model's forward pass there. numba
compiles them for the CPU at hand when they are first called, and keeps them (its cache). Sums are in
fp32, and every result is rounded once, where torch rounds after each of its passes. Each runs on one
thread, beside others that run other passes (``workers.py``).
"""

from __future__ import annotations

import threading
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_THREADS = 2
"""With more threads to a forward pass torch's own kernels, which use them all, are faster."""

_ANY_ORDER = {"reassoc", "contract", "nsz", "arcp", "nnan"}
"""Sums and maxima in any order, which vector units need."""
_LOG2_E = np.float32(1.4426950408889634)
_LEAST_EXPONENT, _MOST_EXPONENT = np.float32(-127.0), np.float32(127.0)
_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)
EXP2 = tuple(map(np.float32, (1.8671302e-3, 9.0170298e-3, 5.5799913e-2, 2.4016444e-1, 6.931513e-1, 1.0)))
"""2**x for x in [0, 1): a polynomial fitted to the smallest relative error, 8e-8 and its rounding."""
_ROUNDING = np.uint32(0x7FFF)
_LEAST_INTEGER, _SIGN, _ALL_BUT_SIGN = np.int32(-(2**31)), np.int32(31), np.int32(2**31 - 1)
_ONE, _HALF_BITS = np.uint32(1), np.uint32(16)

Bits = NDArray[np.uint16]
"""bf16 numbers as their bits, which numpy and numba have no type for."""


def suit(weight: Tensor, threads: int) -> bool:
    """Whether these kernels are the fastest way through a model of such weights, ``threads`` to a pass."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and threads <= MOST_THREADS


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm (arXiv 1910.07467) of [N, hidden]."""
    out = torch.empty_like(states)
    _rms_norm(bits_of(states), bits_of(weight), np.float32(epsilon), bits_of(out))
    return out


def gated(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """silu(gate) * up of contiguous tensors, into ``out``, which must be neither of them."""
    _gated(bits_of(gate).ravel(), bits_of(up).ravel(), bits_of(out).ravel())
    return out


def rotated_by_head(
    states: Tensor, rows: Tensor, length: int, cos: Tensor, sin: Tensor, scale: float, before: Tensor | None
) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), times ``scale``, of rows of ``states`` [N, heads, D].

    ``rows`` int64[B * length] picks them, ``cos`` and ``sin`` [N, 1, D] belong to the packed rows. Returns
    [B, heads, P + length, D] with ``before`` [heads, P, D] first in every one.
    """
    out, start = _room(states, rows, length, before)
    angles = (bits_of(t.reshape(len(states), -1)) for t in (cos, sin))
    _rotated_by_head(bits_of(states), rows.numpy(), *angles, np.float32(scale), start, bits_of(out))
    return out


def by_head(states: Tensor, rows: Tensor, length: int, before: Tensor | None) -> Tensor:
    """The same without the embedding."""
    out, start = _room(states, rows, length, before)
    _by_head(bits_of(states), rows.numpy(), start, bits_of(out))
    return out


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax in place over the keys of ``scores`` [B, heads, L, K], of which ``mask`` [B, L, K] (0, or the
    most negative number) hides some."""
    _masked_softmax(bits_of(scores), bits_of(mask))
    return scores


def largest_and_total(logits: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [N]: the largest of each row of ``logits`` [N, V], and the sum of exponentials of their distances
    from it."""
    largest, total = (torch.empty(len(logits)) for _ in range(2))
    _largest_and_total(bits_of(logits), largest.numpy(), total.numpy())
    return largest, total


class Workspace(threading.local):
    """Memory that a thread's passes use again: the page faults of fresh memory cost as much as their use."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """A tensor [rows, columns] of ``like``'s type, valid until the thread takes that name again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = like.new_empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)


def bits_of(states: Tensor) -> Bits:
    bits: Bits = states.detach().view(torch.uint16).numpy()
    return bits


def _room(states: Tensor, rows: Tensor, length: int, before: Tensor | None) -> tuple[Tensor, int]:
    """[B, heads, P + length, D] with ``before`` in its place, and P."""
    heads, dim = states.shape[1:]
    start = 0 if before is None else before.shape[1]
    out = states.new_empty(len(rows) // length, heads, start + length, dim)
    if before is not None:
        out[:, :, :start] = before
    return out, start


@numba.njit(inline="always")
def wide(bits):  # type: ignore[no-untyped-def]
    """bf16 to fp32."""
    return np.uint32(np.uint32(bits) << _HALF_BITS).view(np.float32)


@numba.njit(inline="always")
def narrow(value):  # type: ignore[no-untyped-def]
    """fp32 to the nearest bf16, ties to even."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> _HALF_BITS) & _ONE)
    return np.uint16(np.uint32(bits + _ROUNDING + odd) >> _HALF_BITS)


@numba.njit(inline="always")
def exp(value):  # type: ignore[no-untyped-def]
    """e**value, and 0 below -87 (smaller numbers slow everything down) and 1.7e38 above 88."""
    power = min(max(np.float32(value * _LOG2_E), _LEAST_EXPONENT), _MOST_EXPONENT)
    whole = np.floor(power)
    part = power - whole
    result = EXP2[0]
    result = result * part + EXP2[1]
    result = result * part + EXP2[2]
    result = result * part + EXP2[3]
    result = result * part + EXP2[4]
    result = result * part + EXP2[5]
    bits = np.int32(np.int32(np.int32(whole) + _BIAS) << _MANTISSA_BITS)
    return result * bits.view(np.float32)


@numba.njit(inline="always")
def largest_of(values):  # type: ignore[no-untyped-def]
    """Largest of fp32 numbers, by integers in the same order: vector units take their maximum sooner."""
    most = _LEAST_INTEGER
    for bits in values.view(np.int32):
        most = max(most, np.int32(bits ^ np.int32(np.int32(bits >> _SIGN) & _ALL_BUT_SIGN)))
    return np.int32(most ^ np.int32(np.int32(most >> _SIGN) & _ALL_BUT_SIGN)).view(np.float32)


def compiled(function: Any) -> Any:
    options: dict[str, Any] = {"nogil": True, "fastmath": _ANY_ORDER, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to write the cache: compile anew in every process
        return numba.njit(**options)(function)


@compiled
def _rms_norm(states, weight, epsilon, out):  # type: ignore[no-untyped-def]
    for i in range(states.shape[0]):
        row, result = states[i], out[i]
        total = np.float32(0)
        for j in range(row.size):
            value = wide(row[j])
            total += value * value
        scale = np.float32(1) / np.sqrt(total / np.float32(row.size) + epsilon)
        for j in range(row.size):
            result[j] = narrow(wide(row[j]) * scale * wide(weight[j]))


@compiled
def _gated(gate, up, out):  # type: ignore[no-untyped-def]
    for i in range(gate.size):
        value = wide(gate[i])
        out[i] = narrow(value / (np.float32(1) + exp(-value)) * wide(up[i]))


@compiled
def _rotated_by_head(states, rows, cos, sin, scale, start, out):  # type: ignore[no-untyped-def]
    batch, heads, end, dim = out.shape
    half, length = dim // 2, end - start
    for b in range(batch):
        for i in range(length):
            row = rows[b * length + i]
            c, s = cos[row], sin[row]
            for head in range(heads):
                taken, put = states[row, head], out[b, head, start + i]
                first, second = taken[:half], taken[half:]
                for j in range(half):
                    x, y = wide(first[j]) * scale, wide(second[j]) * scale
                    put[j] = narrow(x * wide(c[j]) - y * wide(s[j]))
                for j in range(half):
                    x, y = wide(first[j]) * scale, wide(second[j]) * scale
                    put[half + j] = narrow(y * wide(c[half + j]) + x * wide(s[half + j]))


@compiled
def _by_head(states, rows, start, out):  # type: ignore[no-untyped-def]
    batch, heads, end, dim = out.shape
    length = end - start
    for b in range(batch):
        for i in range(length):
            row = rows[b * length + i]
            for head in range(heads):
                taken, put = states[row, head], out[b, head, start + i]
                for j in range(dim):
                    put[j] = taken[j]


@compiled
def _largest_and_total(logits, largest, total):  # type: ignore[no-untyped-def]
    values = np.empty(logits.shape[1], np.float32)
    for i in range(logits.shape[0]):
        row = logits[i]
        for j in range(row.size):
            values[j] = wide(row[j])
        most, summed = largest_of(values), np.float32(0)
        for j in range(row.size):
            summed += exp(values[j] - most)
        largest[i], total[i] = most, summed


@compiled
def _masked_softmax(scores, mask):  # type: ignore[no-untyped-def]
    batch, heads, length, keys = scores.shape
    values = np.empty(keys, np.float32)
    for b in range(batch):
        for head in range(heads):
            for i in range(length):
                row, hidden = scores[b, head, i], mask[b, i]
                for j in range(keys):
                    values[j] = wide(row[j]) + wide(hidden[j])
                largest = largest_of(values)
                total = np.float32(0)
                for j in range(keys):
                    values[j] = exp(values[j] - largest)
                    total += values[j]
                scale = np.float32(1) / total
                for j in range(keys):
                    row[j] = narrow(values[j] * scale)
