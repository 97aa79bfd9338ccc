"""Matrix products of bf16 numbers on a CPU with a matrix unit (``tiles.py``), and what directly follows them.

Unlike oneDNN's products, which torch uses, they keep a block of one factor in the first cache while the
other passes it by, finish one block's sums (add a residual, gate, round) while the next is multiplied, and
read slices of wider weights in place. Each call packs the weight's columns anew, in pieces that stay in the
second cache, which saves a second copy of the model and costs little beside some 2,000 rows. Each runs on
one thread, beside others that run other passes (``workers.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.evaluation import kernels, tiles
from compressor.evaluation.kernels import Workspace, bits_of, compiled, exp

BLOCK = 32
"""Rows and columns that the unit multiplies at a time, and numbers of each."""
_HALF = BLOCK // 2
_PANEL_NUMBERS = 448 * 1024
"""Of packed weights, held at once: not quite half of a second cache of 2 MiB."""
_MOST_DEPTH = 2048
"""A row block of the left factor no deeper than that leaves the caches room for the weights."""
_SUM = torch.empty(0)


@dataclass(frozen=True)
class Means:
    """Which kernels of ours compute a model's passes. They round in their own way: every pass has the same.

    ``fused`` are those for what is no matrix product (``kernels.py``); ``tiled`` those for the matrix unit.
    These take one thread, so that with more to a pass torch's products, which use them all, are better.
    """

    fused: bool
    tiled: bool

    @classmethod
    def of(cls, weight: Tensor, threads: int) -> Means:
        """The fastest for a model of such weights with ``threads`` to a pass."""
        fused = kernels.suit(weight, threads)
        return cls(fused, fused and threads == 1 and tiles.usable())


def suit(*weights: Tensor) -> bool:
    """Whether ``product`` and ``gated_product`` can multiply by ``weights`` [out, in], given the unit."""
    return all(weight.shape[0] % BLOCK == 0 and suit_vocabulary(weight) for weight in weights)


def suit_vocabulary(weight: Tensor) -> bool:
    """Whether ``vocabulary_scores`` can multiply by ``weight`` [V, in], given the unit."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.stride(1) == 1
        and weight.shape[1] % BLOCK == 0
        and weight.shape[1] <= _MOST_DEPTH
    )


def product(
    states: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, memory: Workspace
) -> Tensor:
    """states [N, in] times weight [out, in] transposed, plus ``residual`` [N, out], into ``out``."""
    added = out if residual is None else residual
    _run(states, weight, weight[_HALF:], False, added, residual is not None, memory, out)
    return out


def gated_product(states: Tensor, gate: Tensor, up: Tensor, out: Tensor, memory: Workspace) -> Tensor:
    """silu(states * gate) * (states * up), both weights [width, in], into ``out`` [N, width]."""
    _run(states, gate, up, True, out, False, memory, out)
    return out


def vocabulary_scores(
    states: Tensor, weight: Tensor, starts: NDArray[np.int64], targets: NDArray[np.int64], memory: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """What likelihoods need of the logits [N, V], states [N, in] times weight [V, in] transposed, in fp32.

    Returns the logits of ``targets``, of which row n has those from ``starts[n]`` to ``starts[n + 1]``,
    and for each row the largest logit, and the log of the sum of exponentials. Logits are never held.
    """
    depth = states.shape[1]
    chosen = torch.empty(len(targets))
    largest, total = (
        states.new_full((len(states),), -torch.inf, dtype=torch.float32),
        torch.zeros(len(states)),
    )
    columns = _panel_columns(depth)
    _score_vocabulary(
        bits_of(states),
        weight.data_ptr(),
        weight.stride(0) * weight.element_size(),
        len(weight),
        starts,
        targets,
        bits_of(memory.take("panel", columns, depth, states)),
        memory.take("strip", BLOCK, columns, _SUM).numpy(),
        bits_of(memory.take("edge", 2 * BLOCK, depth, states)),
        tiles.LAYOUT,
        chosen.numpy(),
        largest.numpy(),
        total.numpy(),
    )
    return chosen, largest, total.log_().add_(largest)


def _panel_columns(depth: int) -> int:
    return max(BLOCK, _PANEL_NUMBERS // depth // BLOCK * BLOCK)


def _run(
    states: Tensor,
    first: Tensor,
    second: Tensor,
    gated: bool,
    residual: Tensor,
    adds: bool,
    memory: Workspace,
    out: Tensor,
) -> None:
    depth = states.shape[1]
    _multiply(
        bits_of(states),
        first.data_ptr(),
        second.data_ptr(),
        first.stride(0) * first.element_size(),
        gated,
        bits_of(residual),
        adds,
        bits_of(memory.take("panel", _panel_columns(depth), depth, states)),
        memory.take("sums", 2 * BLOCK, BLOCK, _SUM).view(2, BLOCK, BLOCK).numpy(),
        bits_of(memory.take("edge", 2 * BLOCK, depth, states)),
        tiles.LAYOUT,
        bits_of(out),
    )


@numba.njit(inline="always")
def _pack(weight, stride, depth, target):  # type: ignore[no-untyped-def]
    """16 rows of a weight as the left or right tiles of a block of packed columns."""
    for k in range(0, depth, BLOCK):
        tiles.pack_pairs(weight + 2 * k, stride, target + 2 * BLOCK * k)


@numba.njit(inline="always")
def _left(states, top, edge):  # type: ignore[no-untyped-def]
    """Address and stride of a block of rows, which lies in ``edge`` if the last one is not whole."""
    rows, depth = states.shape
    if top + BLOCK <= rows:
        return np.intp(states.ctypes.data) + 2 * depth * top, 2 * depth
    for i in range(rows - top):
        for j in range(depth):
            edge[i, j] = states[top + i, j]
    return np.intp(edge.ctypes.data), 2 * depth


@numba.njit(inline="always")
def _copied(source, stride, rows, edge):  # type: ignore[no-untyped-def]
    """Address and stride of a copy of these rows and more, in the second half of ``edge``."""
    depth = edge.shape[1]
    for i in range(rows):
        for k in range(0, depth, BLOCK):
            tiles.copy_32(source + i * stride + 2 * k, np.intp(edge[BLOCK + i].ctypes.data) + 2 * k)
    return np.intp(edge[BLOCK].ctypes.data), 2 * depth


@numba.njit(inline="always")
def _finish(gated, adds, sums, residual, out):  # type: ignore[no-untyped-def]
    """One row of a block: from its sums to the output, all given by their addresses."""
    if gated:
        tiles.gate_16(sums, out)
    elif adds:
        tiles.add_32(sums, residual, out)
    else:
        tiles.round_32(sums, out)


@compiled
def _multiply(  # type: ignore[no-untyped-def]
    states, first, second, stride, gated, residual, adds, panel, sums, edge, layout, out
):
    rows, depth = states.shape
    columns = out.shape[1]
    width = _HALF if gated else BLOCK
    most = panel.shape[0] // BLOCK
    finished_a_step = -(-BLOCK * BLOCK // depth)
    target, added = np.intp(out.ctypes.data), np.intp(residual.ctypes.data)
    tiles.begin(np.intp(layout.ctypes.data))
    for start in range(0, columns, most * width):
        count = min(most, (columns - start) // width)
        for block in range(count):
            place = np.intp(panel.ctypes.data) + 2 * BLOCK * depth * block
            _pack(first + (start + block * width) * stride, stride, depth, place)
            _pack(second + (start + block * width) * stride, stride, depth, place + tiles.TILE_BYTES)
        turn, row, column, left_over = 0, 0, 0, 0
        for top in range(0, rows, BLOCK):
            left, left_stride = _left(states, top, edge)
            for block in range(count):
                right = np.intp(panel.ctypes.data) + 2 * BLOCK * depth * block
                tiles.clear_sums()
                done = 0
                before = np.intp(sums.ctypes.data) + (1 - turn) * 4 * BLOCK * BLOCK
                for k in range(0, depth, BLOCK):
                    tiles.add_products(left + 2 * k, left_stride, right + 2 * BLOCK * k)
                    ready = min(left_over, done + finished_a_step)
                    for i in range(done, ready):
                        offset = 2 * ((row + i) * columns + column)
                        _finish(gated, adds, before + 4 * BLOCK * i, added + offset, target + offset)
                    done = ready
                tiles.store_sums(np.intp(sums.ctypes.data) + turn * 4 * BLOCK * BLOCK, 4 * BLOCK)
                turn = 1 - turn
                row, column, left_over = top, start + block * width, min(BLOCK, rows - top)
        for i in range(left_over):
            offset = 2 * ((row + i) * columns + column)
            before = np.intp(sums.ctypes.data) + (1 - turn) * 4 * BLOCK * BLOCK
            _finish(gated, adds, before + 4 * BLOCK * i, added + offset, target + offset)
    tiles.end()


@compiled
def _score_vocabulary(  # type: ignore[no-untyped-def]
    states, weight, stride, vocabulary, starts, targets, panel, strip, edge, layout, chosen, largest, total
):
    rows, depth = states.shape
    most = panel.shape[0]
    tiles.begin(np.intp(layout.ctypes.data))
    for start in range(0, vocabulary, most):
        seen = min(most, vocabulary - start)
        blocks = -(-seen // BLOCK)
        for block in range(blocks):
            place = np.intp(panel.ctypes.data) + 2 * BLOCK * depth * block
            source, source_stride = weight + (start + block * BLOCK) * stride, stride
            whole = min(BLOCK, seen - block * BLOCK)
            if whole < BLOCK:
                source, source_stride = _copied(source, source_stride, whole, edge)
            _pack(source, source_stride, depth, place)
            _pack(source + _HALF * source_stride, source_stride, depth, place + tiles.TILE_BYTES)
        for top in range(0, rows, BLOCK):
            left, left_stride = _left(states, top, edge)
            for block in range(blocks):
                right = np.intp(panel.ctypes.data) + 2 * BLOCK * depth * block
                tiles.clear_sums()
                for k in range(0, depth, BLOCK):
                    tiles.add_products(left + 2 * k, left_stride, right + 2 * BLOCK * k)
                tiles.store_sums(np.intp(strip.ctypes.data) + 4 * BLOCK * block, 4 * most)
            for i in range(min(BLOCK, rows - top)):
                row, place = top + i, np.intp(strip.ctypes.data) + 4 * most * i
                for j in range(seen, blocks * BLOCK):
                    strip[i, j] = -np.inf
                high = max(largest[row], tiles.largest(place, blocks))
                summed = tiles.sum_exponentials(place, blocks, high)
                total[row] = total[row] * exp(largest[row] - high) + summed
                largest[row] = high
                for n in range(starts[row], starts[row + 1]):
                    if start <= targets[n] < start + seen:
                        chosen[n] = strip[i, targets[n] - start]
    tiles.end()
