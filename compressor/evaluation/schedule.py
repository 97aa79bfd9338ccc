"""A packing laid out as forward passes: which trees run together, and how their attention is batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compressor.evaluation.packing import Packing, Tree
from compressor.evaluation.workers import most_workers

BLOCK_BYTES = {"cpu": 4096, "cuda": 32768}
"""Tokens of a forward pass times bytes of a number: enough to keep the matrix units busy, few enough to
stay in the caches."""
LEAST_BLOCK_TOKENS = 256
"""Fewer are not shared out among threads."""
WAVE_TOKENS, LEAST_WAVE_TOKENS = 8192, 512
"""Tokens of prefixes whose keys and values are kept at once: where memory is short, no more than fit a
quarter of what the weights leave of it."""
LONG_ATTENTION = 96
"""From so many keys on, attention is fused (flash): its scores are never held whole, and it is faster."""
KEYS_STEP, KEYS_OVER = 32, 4
"""On a CPU, rows of scores end at a whole vector: torch's softmax in bf16 takes the numbers of an incomplete
one one by one, which for 27 keys took five times as long as for 32. A few over are cheaper in short rows."""


@dataclass(frozen=True)
class Rows:
    """Trees of one call as a padded batch of queries.

    ``gather`` int64[B * L] picks block rows (padding repeats one); ``valid`` int64[n] picks the n real
    ones back; ``offsets`` int64[B, L] is each query's place in its tree, and ``counts`` int64[B] how many
    of them are real.
    """

    batch: int
    length: int
    gather: Tensor
    valid: Tensor
    offsets: Tensor
    counts: Tensor

    def gather_by_head(self, heads: int) -> Tensor:
        """int64[B * heads * L] into block rows by heads [N * heads]: the padded batch as [B, heads, L]."""
        head = torch.arange(heads, device=self.gather.device)[:, None]
        return (self.gather.view(self.batch, 1, self.length) * heads + head).flatten()

    def valid_by_head(self, heads: int) -> Tensor:
        """int64[n * heads] into [B * heads * L]: the real rows of each head, as [n, heads]."""
        head = torch.arange(heads, device=self.valid.device)
        first = (self.valid // self.length * heads)[:, None] + head
        return (first * self.length + (self.valid % self.length)[:, None]).flatten()


@dataclass(frozen=True)
class Call:
    """Attention of trees that hang from the same prefix: block rows ``start`` to ``end``.

    ``full`` holds all their tokens as queries; ``scored`` only those whose output is wanted (None: none
    is), for the last layer. ``keys`` holds them as keys, K to a tree, and ``ends`` int64[B, K] the last
    token below each key's token (-1: padding). ``before`` counts the prefix's keys, which all see, and
    ``longest`` the keys a token may see.
    """

    parent: int
    start: int
    end: int
    before: int
    longest: int
    ends: Tensor
    full: Rows
    keys: Rows
    scored: Rows | None

    def mask(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """[B, L, before + K]: 0 where a query sees a key, else the most negative number."""
        order = torch.arange(self.ends.shape[1], device=self.ends.device)
        queries = rows.offsets[:, :, None]
        hidden = (order > queries) | (self.ends[:, None] < queries)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return F.pad(mask.masked_fill_(hidden, torch.finfo(dtype).min), (self.before, 0))


@dataclass(frozen=True)
class Step:
    """One forward pass over ``ids``, ``positions`` int64[N].

    ``keep`` lists (prefix, first row, end row) whose keys and values later steps read; ``drop`` the
    prefixes nobody reads any more. Outputs at block rows ``scored`` are score rows ``rows``. One that
    ``waits`` reads what those before it keep; the others may run beside them.
    """

    ids: Tensor
    positions: Tensor
    calls: tuple[Call, ...]
    keep: tuple[tuple[int, int, int], ...]
    drop: tuple[int, ...]
    scored: Tensor
    rows: Tensor
    waits: bool


def wave_tokens(room_bytes: int, kept_per_token: int) -> int:
    """Tokens of a wave where so much memory is left beside the weights. What a device has decides, not what
    is free at the moment: in bf16 a score depends a little on what is computed beside it."""
    return max(LEAST_WAVE_TOKENS, min(WAVE_TOKENS, room_bytes // 4 // max(1, kept_per_token)))


def schedule(
    packing: Packing, device: torch.device, dtype: torch.dtype, wave: int = WAVE_TOKENS
) -> list[Step]:
    """Forward passes in an order that respects prefixes, of which ``wave`` tokens are kept at once. Made once
    for any number of sub-networks."""
    first_rows = np.cumsum([0, *(len(tree.scored) for tree in packing.trees)])
    budget = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cpu"]) // dtype.itemsize
    workers = most_workers() if device.type == "cpu" else 1
    layout = _Layout(packing, first_rows, device)
    steps = []
    last_reader = _last_readers(packing)
    for prefixes, leaves in _waves(packing, wave):
        levels = _levels(packing, prefixes)
        for kept, trees in (*((True, level) for level in levels), (False, leaves)):
            for number, block in enumerate(_blocks(packing, trees, budget, workers)):
                steps.append(layout.step(block, kept, waits=number == 0))
        done = prefixes[-1] if prefixes else -1
        drop = tuple(p for p, reader in enumerate(last_reader) if reader <= done)
        steps[-1] = replace(steps[-1], drop=drop)
    return steps


def _waves(packing: Packing, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of prefixes, in depth-first order, with the trees that hang from them."""
    leaves_of: dict[int, list[int]] = {}
    for number in range(packing.prefixes, len(packing.trees)):
        leaves_of.setdefault(packing.trees[number].parent, []).append(number)
    wave: list[int] = []
    leaves = leaves_of.get(-1, [])
    kept = 0
    for prefix in range(packing.prefixes):
        kept += packing.prefix_length(prefix)
        if wave and kept > most:
            yield wave, leaves
            wave, leaves, kept = [], [], packing.prefix_length(prefix)
        wave.append(prefix)
        leaves = leaves + leaves_of.get(prefix, [])
    yield wave, leaves


def _levels(packing: Packing, prefixes: Sequence[int]) -> list[list[int]]:
    """The prefixes of a wave, those first that hang from none of the same wave."""
    level: dict[int, int] = {}
    for prefix in prefixes:
        level[prefix] = level.get(packing.trees[prefix].parent, -1) + 1
    ordered = sorted(prefixes, key=level.__getitem__)
    return [list(group) for _, group in groupby(ordered, key=level.__getitem__)]


def _blocks(packing: Packing, numbers: Sequence[int], budget: int, workers: int) -> Iterator[list[int]]:
    """Trees sorted by prefix and length, cut into even blocks of at most about ``budget`` tokens: as many
    for each of the ``workers`` that take them, unless there are too few tokens to share."""
    if not numbers:
        return
    ordered = sorted(numbers, key=lambda t: (packing.trees[t].parent, len(packing.trees[t])))
    ends = np.cumsum([len(packing.trees[number]) for number in ordered])
    starts, total = np.concatenate([[0], ends[:-1]]), int(ends[-1])
    count = -(-total // budget)
    if total >= workers * LEAST_BLOCK_TOKENS:
        count = -(-count // workers) * workers
    places = ((starts + ends) * count // (2 * total)).tolist()  # of the trees' middles
    for _, block in groupby(zip(places, ordered, strict=True), key=lambda pair: pair[0]):
        yield [number for _, number in block]


def _last_readers(packing: Packing) -> list[int]:
    """For each prefix, the last prefix of its subtree."""
    readers = list(range(packing.prefixes))
    for prefix in reversed(range(packing.prefixes)):
        parent = packing.trees[prefix].parent
        if parent >= 0:
            readers[parent] = max(readers[parent], readers[prefix])
    return readers


@dataclass(frozen=True)
class _Layout:
    packing: Packing
    first_rows: NDArray[np.int64]
    device: torch.device

    def step(self, block: Sequence[int], kept: bool, waits: bool) -> Step:
        trees = [self.packing.trees[number] for number in block]
        starts = np.cumsum([0, *(len(tree) for tree in trees)])
        calls = []
        for parent, group in groupby(range(len(trees)), key=lambda i: trees[i].parent):
            members = list(group)
            calls.append(self._call(parent, [trees[i] for i in members], starts[members[0]]))
        spans = zip(block, starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        scored = [tree.scored + start for tree, start in zip(trees, starts[:-1], strict=True)]
        rows = [np.arange(self.first_rows[n], self.first_rows[n + 1]) for n in block]
        return Step(
            self._long(np.concatenate([tree.ids for tree in trees])),
            self._long(np.concatenate([tree.positions for tree in trees])),
            tuple(calls),
            tuple(spans) if kept else (),
            (),
            self._long(np.concatenate(scored)),
            self._long(np.concatenate(rows)),
            waits,
        )

    def _call(self, parent: int, trees: Sequence[Tree], start: int) -> Call:
        longest = max(len(tree) for tree in trees)
        before = self.packing.prefix_length(parent)
        wide = self._whole_vectors(before + longest) - before
        ends = np.full((len(trees), wide), -1)
        for i, tree in enumerate(trees):
            ends[i, : len(tree)] = tree.ends
        everything = [np.arange(len(tree)) for tree in trees]
        full = self._rows(trees, everything, int(start), longest)
        keys = full if wide == longest else self._rows(trees, everything, int(start), wide)
        wanted = [tree.scored for tree in trees]
        most = max(map(len, wanted))
        scored = self._rows(trees, wanted, int(start), most) if most else None
        end = int(start) + sum(len(tree) for tree in trees)
        seen = before + longest
        return Call(parent, int(start), end, before, seen, self._long(ends), full, keys, scored)

    def _whole_vectors(self, keys: int) -> int:
        """The keys that a row of scores is computed for, where it sees ``keys``."""
        short = keys <= LONG_ATTENTION
        if self.device.type != "cpu" or (short and 0 < keys % KEYS_STEP <= KEYS_OVER):
            return keys
        return -(-keys // KEYS_STEP) * KEYS_STEP

    def _rows(
        self, trees: Sequence[Tree], chosen: Sequence[NDArray[np.int64]], start: int, length: int
    ) -> Rows:
        """The chosen token offsets of each tree as a batch padded to ``length``."""
        gather = np.full((len(trees), length), start)
        padded = np.zeros((len(trees), length), np.int64)
        valid = np.zeros((len(trees), length), np.bool_)
        for i, (tree, offsets) in enumerate(zip(trees, chosen, strict=True)):
            gather[i, : len(offsets)] = start + offsets
            padded[i, : len(offsets)] = offsets
            valid[i, : len(offsets)] = True
            start += len(tree)
        return Rows(
            len(trees),
            length,
            self._long(gather.ravel()),
            self._long(np.flatnonzero(valid)),
            self._long(padded),
            self._long(valid.sum(1)),
        )

    def _long(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device)
