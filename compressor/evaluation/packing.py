"""Many token sequences packed so that a prefix that several share is computed once.

All sequences form one trie. Small subtrees (an item with its choices) become packed trees, scored by
one row of attention each; a prefix whose sharing pays (few-shot examples, a task's preamble) is
computed once and its keys and values are kept for every tree below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compressor.evaluation.encoding import Encoded

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Costs:
    """What a plan costs beside the matrix products of its tokens, in those of one token.

    ``key``: attending to one more key. Keys are attended to ``step`` at a time, a prefix's apart from a
    tree's own, so that each of the two ends with some for nothing. ``prefix``: keeping one more apart.
    """

    prefix: float = 128
    key: float = 0.0008
    step: int = 1

    def of(self, new: int, before: int) -> float:
        """Tokens of a tree or prefix, each with all its own keys and those of so many before them."""
        keys = sum(-(-count // self.step) * self.step for count in (new, before))
        return new * (1 + self.key * keys)


CPU_COSTS = Costs()
TILED_COSTS = Costs(key=0.003, step=32)
"""Measured with the starter on a CPU, by PyTorch's products and by those of a matrix unit."""


@dataclass(frozen=True)
class Tree:
    """Tokens computed together: a subtree of the trie in depth-first order.

    ``ids``, ``positions`` int64[n]; ``ends`` int64[n]: the last token below each token, so that token
    i sees token j where ``j <= i <= ends[j]``. ``parent`` numbers the prefix it hangs from (-1: none).
    ``scored``: token offsets whose next token is wanted.
    """

    ids: Ints
    positions: Ints
    ends: Ints
    parent: int
    scored: Ints

    def __len__(self) -> int:
        return len(self.ids)

    def mask(self) -> NDArray[np.bool_]:
        """bool[n, n]: which token (row) sees which (column)."""
        order = np.arange(len(self.ids))
        seen: NDArray[np.bool_] = (order[None, :] <= order[:, None]) & (self.ends[None, :] >= order[:, None])
        return seen


@dataclass(frozen=True)
class Packing:
    """Trees in waves, and where each request's scores come from.

    ``trees``: first those that others hang from, each after its own parent. ``prefixes`` counts them:
    tree p < prefixes is prefix p. ``rows[t]`` is the first score row of tree t; request r's tokens
    are at ``request_rows[request_starts[r] : request_starts[r + 1]]`` with ``targets`` alongside.
    """

    trees: tuple[Tree, ...]
    prefixes: int
    request_rows: Ints
    request_starts: Ints
    targets: Ints
    num_rows: int
    tokens: int = field(default=0)

    def prefix_length(self, index: int) -> int:
        """Tokens of a prefix with everything that it hangs from; 0 for -1."""
        return 0 if index < 0 else int(self.trees[index].positions[-1]) + 1


def pack(requests: Sequence[Encoded], costs: Costs = CPU_COSTS) -> Packing:
    """The packing of all requests. Cheap beside scoring; done once for any number of sub-networks."""
    inputs = sorted({request.inputs for request in requests})
    trie = _Trie(inputs)
    wanted = _wanted_nodes(trie, inputs, requests)
    prefixes: list[Tree] = []
    leaves: list[Tree] = []
    members: list[Ints] = []
    member_prefixes: list[Ints] = []
    for nodes, parent, is_prefix in _partition(trie, costs):
        tree = trie.tree(nodes, parent, wanted.flags)
        (prefixes if is_prefix else leaves).append(tree)
        (member_prefixes if is_prefix else members).append(nodes)
    trees = (*prefixes, *leaves)
    row_of_node = np.full(trie.size, -1)
    row = 0
    for tree, nodes in zip(trees, (*member_prefixes, *members), strict=True):
        row_of_node[nodes[tree.scored]] = np.arange(row, row + len(tree.scored))
        row += len(tree.scored)
    return Packing(
        trees,
        len(prefixes),
        row_of_node[wanted.nodes],
        wanted.starts,
        wanted.targets,
        row,
        sum(len(tree) for tree in trees),
    )


def pack_rows(ids: Ints) -> Packing:
    """Sequences int64[B, T] of equal length, each token's successor wanted: score rows are b * T + t."""
    batch, length = ids.shape
    order = np.arange(length)
    ends = np.full(length, length - 1)
    trees = tuple(Tree(row, order, ends, -1, order) for row in ids)
    empty = np.zeros(0, np.int64)
    return Packing(trees, 0, empty, empty, empty, batch * length, batch * length)


@dataclass(frozen=True)
class _Wanted:
    nodes: Ints
    starts: Ints
    targets: Ints
    flags: NDArray[np.bool_]


class _Trie:
    """The trie of sorted distinct sequences; nodes (tokens) are numbered depth first."""

    def __init__(self, inputs: Sequence[tuple[int, ...]]) -> None:
        arrays = [np.asarray(sequence, np.int64) for sequence in inputs]
        self.lengths = np.array([len(array) for array in arrays])
        self.shared = np.zeros(len(arrays), np.int64)
        for i in range(1, len(arrays)):
            self.shared[i] = _common_prefix(arrays[i - 1], arrays[i])
        news = self.lengths - self.shared
        self.starts = np.concatenate([[0], np.cumsum(news)])
        self.size = int(self.starts[-1])
        self.ids = np.concatenate([a[s:] for a, s in zip(arrays, self.shared, strict=True)])
        self.depths = np.concatenate(
            [np.arange(s, n) for s, n in zip(self.shared, self.lengths, strict=True)]
        )
        self.ends = _subtree_ends(self.depths)

    def path(self, sequence: int) -> Ints:
        """Nodes of one sequence, from the root."""
        nodes = np.empty(self.lengths[sequence], np.int64)
        depth, current = int(self.lengths[sequence]), sequence
        while depth > 0:
            first = int(self.shared[current])
            if first < depth:
                start = self.starts[current]
                nodes[first:depth] = np.arange(start, start + depth - first)
                depth = first
            current -= 1
        return nodes

    def tree(self, nodes: Ints, parent: int, wanted: NDArray[np.bool_]) -> Tree:
        """The tree of these nodes, which ascend."""
        ends = np.searchsorted(nodes, self.ends[nodes], side="right") - 1
        return Tree(self.ids[nodes], self.depths[nodes], ends, parent, np.flatnonzero(wanted[nodes]))


def _partition(trie: _Trie, costs: Costs) -> Iterator[tuple[Ints, int, bool]]:
    """Nodes of each tree, its parent prefix, and whether it is a prefix itself."""
    prefixes = 0
    stack: list[tuple[int, int, int, int]] = [(0, len(trie.lengths), 0, -1)]
    planner = _Planner(trie, costs)
    while stack:
        low, high, covered, parent = stack.pop()
        choice = planner.choose(low, high, covered)
        if choice == "tree":
            path = trie.path(low)[covered:]
            rest = np.arange(trie.starts[low + 1], trie.starts[high])
            yield np.concatenate([path, rest]), parent, False
            continue
        common = planner.common(low, high)
        if choice == "prefix":
            yield trie.path(low)[covered:common], parent, True
            covered, parent = common, prefixes
            prefixes += 1
        children = planner.children(low, high)
        stack.extend((a, b, covered, parent) for a, b in reversed(children))


class _Planner:
    """Decides, for each subtree, what is cheapest: one tree, its children apart, or a kept prefix."""

    def __init__(self, trie: _Trie, costs: Costs) -> None:
        self.trie = trie
        self.costs = costs
        self._found: dict[tuple[int, int, int], tuple[float, str]] = {}
        self._children: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def choose(self, low: int, high: int, covered: int) -> str:
        return self._best(low, high, covered)[1]

    def common(self, low: int, high: int) -> int:
        """Tokens that all sequences of the range share."""
        inner = self.trie.shared[low + 1 : high]
        return int(min(inner.min(), self.trie.lengths[low])) if len(inner) else int(self.trie.lengths[low])

    def children(self, low: int, high: int) -> list[tuple[int, int]]:
        """The range cut where sequences part after what all of them share."""
        if (low, high) not in self._children:
            cuts = np.flatnonzero(self.trie.shared[low + 1 : high] == self.common(low, high)) + low + 1
            bounds = [low, *cuts.tolist(), high]
            self._children[low, high] = list(pairwise(bounds))
        return self._children[low, high]

    def _best(self, low: int, high: int, covered: int) -> tuple[float, str]:
        key = (low, high, covered)
        if key not in self._found:
            self._found[key] = self._compare(low, high, covered)
        return self._found[key]

    def _compare(self, low: int, high: int, covered: int) -> tuple[float, str]:
        size = self._size(low, high, covered)
        one = self.costs.of(size, covered)
        if high - low == 1:
            return one, "tree"
        options = [(one, "tree")] if size <= _LARGEST_TREE else []
        children = self.children(low, high)
        common = self.common(low, high)
        options.append((sum(self._best(a, b, covered)[0] for a, b in children), "apart"))
        if common > covered:
            below = sum(self._best(a, b, common)[0] for a, b in children)
            own = self.costs.of(common - covered, covered)
            options.append((below + own + self.costs.prefix, "prefix"))
        return min(options)

    def _size(self, low: int, high: int, covered: int) -> int:
        rest = self.trie.starts[high] - self.trie.starts[low + 1]
        return int(self.trie.lengths[low]) - covered + int(rest)


_LARGEST_TREE = 1024


def _wanted_nodes(trie: _Trie, inputs: Sequence[tuple[int, ...]], requests: Sequence[Encoded]) -> _Wanted:
    """The node before each scored token of each request, with that token."""
    number = {sequence: i for i, sequence in enumerate(inputs)}
    paths: dict[int, Ints] = {}
    nodes, targets, starts = [], [], [0]
    for request in requests:
        sequence = number[request.inputs]
        if sequence not in paths:
            paths[sequence] = trie.path(sequence)
        nodes.append(paths[sequence][-request.scored :])
        targets.append(request.ids[-request.scored :])
        starts.append(starts[-1] + request.scored)
    flat = np.concatenate(nodes)
    flags = np.zeros(trie.size, np.bool_)
    flags[flat] = True
    return _Wanted(flat, np.array(starts), np.concatenate([np.asarray(t) for t in targets]), flags)


def _common_prefix(a: Ints, b: Ints) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _subtree_ends(depths: Ints) -> Ints:
    """For nodes in depth-first order, the last node of each one's subtree."""
    ends = np.empty(len(depths), np.int64)
    stack: list[int] = []
    for node, depth in enumerate(depths.tolist()):
        while stack and depths[stack[-1]] >= depth:
            ends[stack.pop()] = node - 1
        stack.append(node)
    ends[stack] = len(depths) - 1
    return ends
