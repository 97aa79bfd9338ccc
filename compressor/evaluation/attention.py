"""Attention of packed trees in bf16 on a CPU with a matrix unit (``tiles.py``), from projections to output.

One call rotates queries and keys, multiplies, hides, normalises and mixes, tree by tree and by groups of
heads that share keys, in blocks that stay in the first cache; nothing is gathered or padded in memory.
Keys and values of a prefix that many trees share are packed once a group of heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from compressor.evaluation import tiles
from compressor.evaluation.kernels import Workspace, bits_of, compiled
from compressor.evaluation.products import BLOCK
from compressor.evaluation.schedule import Call, Rows

_HALF = BLOCK // 2
_STEP_BYTES = 2 * tiles.TILE_BYTES
"""The right factor of one step of the matrix unit."""
_SUM = torch.empty(0)
_MOST_TOKENS = 2048
"""Of a tree: what its tokens see of each other is held as a square of numbers."""


def suit(calls: Sequence[Call], head_dim: int) -> bool:
    """Whether ``attend`` can take these calls, given the unit: short enough trees, and wide enough heads."""
    return head_dim % (2 * BLOCK) == 0 and all(call.full.length <= _MOST_TOKENS for call in calls)


def attend(
    calls: Sequence[Call],
    queries: Sequence[Rows | None],
    states: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor] | None,
    scale: float,
    before: Sequence[tuple[Tensor, Tensor] | None],
    memory: Workspace,
) -> Tensor:
    """Attention output [n, heads * D] of the calls' ``queries`` (None: none of its own), valid until the
    thread's next call, from all queries [N, H, D], keys and values [N, G, D] of a pass.

    ``angles``, cosines and sines [N, 1, D], rotate queries and keys (RoFormer, arXiv 2104.09864), and
    ``scale`` multiplies queries; without angles, both is done. ``before`` are keys and values [G, P, D] of
    each call's prefix.
    """
    query, key, _ = states
    wanted = [len(rows.valid) if rows else 0 for rows in queries]
    out = memory.take("attended", sum(wanted), query.shape[1] * query.shape[2], query)
    none = key[:0].transpose(0, 1)
    for call, rows, past, part in zip(calls, queries, before, torch.split(out, wanted), strict=True):
        if rows:
            _attend_one(call, rows, states, angles, scale, past or (none, none), memory, part)
    return out


def _attend_one(
    call: Call,
    queries: Rows,
    states: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor] | None,
    scale: float,
    past: tuple[Tensor, Tensor],
    memory: Workspace,
    out: Tensor,
) -> None:
    query, key, value = states
    rows, _, dim = query.shape
    groups = key.shape[1]
    cos, sin = angles or (query, query)
    longest = call.full.length
    own, blocks = -(-longest // BLOCK), -(-past[0].shape[1] // BLOCK) - (-longest // BLOCK)
    wide = blocks * BLOCK
    _attend(
        bits_of(query),
        bits_of(key),
        bits_of(value),
        angles is not None,
        bits_of(cos.reshape(rows, -1)),
        bits_of(sin.reshape(rows, -1)),
        np.float32(scale),
        call.start,
        call.full.counts.numpy(),
        call.ends.numpy(),
        queries.counts.numpy(),
        queries.offsets.numpy(),
        bits_of(past[0]),
        bits_of(past[1]),
        bits_of(memory.take("attention blocks", 3 * BLOCK, dim, query).view(3, BLOCK, dim)),
        bits_of(memory.take("attention panels", 2 * groups * wide, dim, query).view(groups, 2, -1)),
        memory.take("attention scores", BLOCK, wide, _SUM).numpy(),
        bits_of(memory.take("attention weights", BLOCK, wide, query)),
        memory.take("attention sums", dim, BLOCK, _SUM).view(-1, BLOCK, BLOCK).numpy(),
        memory.take("attention hidden", longest, own * BLOCK, _SUM).numpy(),
        tiles.LAYOUT,
        bits_of(out),
    )


@numba.njit(inline="always")
def _address(array):  # type: ignore[no-untyped-def]
    return np.intp(array.ctypes.data)


@numba.njit(inline="always")
def _copy(source, dim, target):  # type: ignore[no-untyped-def]
    """A head's numbers from one address to another."""
    for j in range(0, dim, BLOCK):
        tiles.copy_32(source + 2 * j, target + 2 * j)


@numba.njit(inline="always")
def _take(source, dim, rotates, cos, sin, scale, target):  # type: ignore[no-untyped-def]
    """A head's numbers from one address to another, rotated and scaled if need be."""
    if not rotates:
        _copy(source, dim, target)
        return
    for j in range(0, dim // 2, BLOCK):
        tiles.rotate_32(source + 2 * j, dim, cos + 2 * j, sin + 2 * j, scale, target + 2 * j)


@numba.njit
def _pack(blocks, rows, panels, number):  # type: ignore[no-untyped-def]
    """A block of keys and one of values, of so many rows, as right factors of scores and of their mixture.

    The panel of keys holds blocks of keys by steps over the head's numbers; that of values, blocks of the
    head's numbers by steps over the keys.
    """
    dim = blocks.shape[2]
    keys, values = _address(blocks[0]), _address(blocks[1])
    blocks[:2, rows:] = 0
    wide = panels.shape[1] // dim // BLOCK
    for j in range(0, dim, BLOCK):
        place = _address(panels[0]) + (number * dim + j) // BLOCK * _STEP_BYTES
        tiles.pack_pairs(keys + 2 * j, 2 * dim, place)
        tiles.pack_pairs(keys + 2 * j + 2 * dim * _HALF, 2 * dim, place + tiles.TILE_BYTES)
        place = _address(panels[1]) + (j // BLOCK * wide + number) * _STEP_BYTES
        for pair in range(_HALF):
            row = values + 4 * dim * pair + 2 * j
            tiles.pair_16(row, row + 2 * dim, place + 4 * _HALF * pair)
            row += 2 * _HALF
            tiles.pair_16(row, row + 2 * dim, place + 4 * _HALF * pair + tiles.TILE_BYTES)


@numba.njit(inline="always")
def _soften(scores, hidden, before, blocks, weights):  # type: ignore[no-untyped-def]
    """Scores of a row of so many blocks of keys, ``before`` of them a prefix's, to exponentials; all by
    their addresses. Returns the factor that makes weights of them."""
    tiles.hide(scores + 4 * BLOCK * before, hidden, blocks - before)
    largest = tiles.largest(scores, blocks)
    return np.float32(1) / tiles.store_exponentials(scores, blocks, largest, weights)


@numba.njit
def _hide(ends, size, wide, hidden):  # type: ignore[no-untyped-def]
    """Minus infinity where a token of a tree does not see another, else 0."""
    for i in range(size):
        for j in range(wide):
            hidden[i, j] = -np.inf
        for j in range(i + 1):
            if ends[j] >= i:
                hidden[i, j] = 0


@compiled
def _attend(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    rotates,
    cos,
    sin,
    scale,
    first,
    sizes,
    ends,
    counts,
    offsets,
    past_keys,
    past_values,
    blocks,
    panels,
    scores,
    weights,
    sums,
    hidden,
    layout,
    out,
):
    heads, dim = query.shape[1:]
    groups, past = key.shape[1], past_keys.shape[1]
    repeats, past_blocks = heads // groups, -(-past // BLOCK)
    factors = np.empty(BLOCK, np.float32)
    tiles.begin(_address(layout))
    for group in range(groups):
        for block in range(past_blocks):
            rows = min(BLOCK, past - block * BLOCK)
            for i in range(rows):
                _copy(_address(past_keys[group, block * BLOCK + i]), dim, _address(blocks[0, i]))
                _copy(_address(past_values[group, block * BLOCK + i]), dim, _address(blocks[1, i]))
            _pack(blocks, rows, panels[group], block)
    start, done = first, 0
    for tree in range(len(sizes)):
        size, count = sizes[tree], counts[tree]
        own_blocks = -(-size // BLOCK) if count else 0
        wide = (past_blocks + own_blocks) * BLOCK
        if tree + 1 < len(sizes):
            for states in (query, key, value):
                row_bytes = 2 * dim * states.shape[1]
                tiles.fetch(_address(states) + row_bytes * (start + size), row_bytes * sizes[tree + 1])
        _hide(ends[tree], size, own_blocks * BLOCK, hidden)
        for group in range(groups):
            for block in range(own_blocks):
                rows = min(BLOCK, size - block * BLOCK)
                for i in range(rows):
                    row = start + block * BLOCK + i
                    taken, put = _address(key[row, group]), _address(blocks[0, i])
                    _take(taken, dim, rotates, _address(cos[row]), _address(sin[row]), np.float32(1), put)
                    _copy(_address(value[row, group]), dim, _address(blocks[1, i]))
                _pack(blocks, rows, panels[group], past_blocks + block)
            head, place = group * repeats, 0
            for begun in range(0, count * repeats, BLOCK):
                rows = min(BLOCK, count * repeats - begun)
                head_before, place_before = head, place
                for i in range(rows):
                    row = start + offsets[tree, place]
                    taken, put = _address(query[row, head]), _address(blocks[2, i])
                    _take(taken, dim, rotates, _address(cos[row]), _address(sin[row]), scale, put)
                    head, place = _next(head, place, count)
                _multiply_keys(blocks[2], panels[group, 0], scores, wide)
                head, place = head_before, place_before
                for i in range(rows):
                    for j in range(past, past_blocks * BLOCK):
                        scores[i, j] = -np.inf
                    masks, into = _address(hidden[offsets[tree, place]]), _address(weights[i])
                    factors[i] = _soften(_address(scores[i]), masks, past_blocks, wide // BLOCK, into)
                    head, place = _next(head, place, count)
                _mix_values(weights, panels[group, 1], sums, wide)
                head, place = head_before, place_before
                for i in range(rows):
                    put = _address(out[done + place]) + 2 * head * dim
                    for part in range(dim // BLOCK):
                        tiles.scale_32(_address(sums[part, i]), factors[i], put + 2 * BLOCK * part)
                    head, place = _next(head, place, count)
        start += size
        done += count
    tiles.end()


@numba.njit(inline="always")
def _next(head, place, count):  # type: ignore[no-untyped-def]
    """The row of queries after that one: tokens in order, head by head."""
    return (head + 1, 0) if place + 1 == count else (head, place + 1)


@numba.njit(inline="always")
def _multiply_keys(queries, panel, scores, wide):  # type: ignore[no-untyped-def]
    """A block of queries times so many packed keys."""
    dim = queries.shape[1]
    for j in range(0, wide, BLOCK):
        tiles.clear_sums()
        for k in range(0, dim, BLOCK):
            right = _address(panel) + (j // BLOCK * dim + k) // BLOCK * _STEP_BYTES
            tiles.add_products(_address(queries) + 2 * k, 2 * dim, right)
        tiles.store_sums(_address(scores) + 4 * j, 4 * scores.shape[1])


@numba.njit(inline="always")
def _mix_values(weights, panel, sums, wide):  # type: ignore[no-untyped-def]
    """A block of weights of so many keys times their packed values: sums [D / 32, 32, 32]."""
    steps = weights.shape[1] // BLOCK
    for part in range(sums.shape[0]):
        tiles.clear_sums()
        for j in range(0, wide, BLOCK):
            right = _address(panel) + (part * steps + j // BLOCK) * _STEP_BYTES
            tiles.add_products(_address(weights) + 2 * j, 2 * weights.shape[1], right)
        tiles.store_sums(_address(sums[part]), 4 * BLOCK)
