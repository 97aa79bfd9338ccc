"""Keys and values of every sequence: one row each in a cache that is bounded and never reallocated.

The cache is one anonymous mapping, [layer and kind][row][kv head][position][head dim]. Its address
space is as long as every row filled to capacity, but memory is taken only by positions written, so
admission counts positions and a dropped row gives its pages back. Rows that decode together are
consecutive, which is why rows can be swapped.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

TRIM_TOKENS = 256


@dataclass(frozen=True)
class CacheShape:
    """Of one row: ``capacity`` positions in ``layers`` layers of ``heads`` x ``head_dim`` keys and values."""

    layers: int
    heads: int
    head_dim: int
    dtype: np.dtype[np.generic]
    capacity: int

    @property
    def numerics(self) -> str:
        """Of keys and values, by their usual names."""
        return {"float32": "fp32", "float16": "fp16"}.get(self.dtype.name, self.dtype.name)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


@dataclass
class Row:
    """What a row holds: the tokens whose keys and values are valid, and how far it was ever written.

    ``pending`` more positions are being written: some layers have their keys and values already.
    """

    tokens: list[int] = field(default_factory=list)
    pending: int = 0
    touched: int = 0
    last_used: float = 0.0

    @property
    def filled(self) -> int:
        return len(self.tokens) + self.pending


class KeyValueCache:
    """``rows`` rows; ``tensors[2 * layer + kind]`` is [rows, heads, capacity, head_dim]."""

    def __init__(self, shape: CacheShape, rows: int) -> None:
        self.shape = shape
        self.rows = [Row() for _ in range(rows)]
        dims = (rows, shape.heads, shape.capacity, shape.head_dim)
        self._row_bytes = math.prod(dims[1:]) * shape.dtype.itemsize
        self._tensor_bytes = _whole_pages(self._row_bytes * rows)
        self._memory = _reserve(self._tensor_bytes * 2 * shape.layers)
        self.tensors: list[npt.NDArray[np.generic]] = [
            np.frombuffer(self._memory, shape.dtype, math.prod(dims), index * self._tensor_bytes).reshape(
                dims
            )
            for index in range(2 * shape.layers)
        ]

    @property
    def used_tokens(self) -> int:
        """Positions that occupy memory, over all rows."""
        return sum(row.touched for row in self.rows)

    def swap(self, one: int, other: int) -> None:
        """Exchange two rows, contents and all."""
        if one == other:
            return
        first, second = self.rows[one], self.rows[other]
        here, there = first.filled, second.filled
        for tensor in self.tensors:
            saved = tensor[one, :, :here].copy()
            tensor[one, :, :there] = tensor[other, :, :there]
            tensor[other, :, :here] = saved
        self.rows[one], self.rows[other] = second, first
        first.touched, second.touched = max(second.touched, here), max(first.touched, there)
        self.trim(one)
        self.trim(other)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Make ``target`` hold the first ``length`` tokens of ``source``."""
        for tensor in self.tensors:
            tensor[target, :, :length] = tensor[source, :, :length]
        row = self.rows[target]
        row.tokens = self.rows[source].tokens[:length]
        row.touched = max(row.touched, length)

    def drop(self, index: int) -> None:
        """Forget a row and give its memory back."""
        if self.rows[index].touched:
            self._give_back(index, 0)
        self.rows[index] = Row()

    def trim(self, index: int) -> None:
        """Give back what a longer sequence left behind, unless that is little."""
        row = self.rows[index]
        if row.touched - row.filled > TRIM_TOKENS:
            self._give_back(index, row.filled)
            row.touched = row.filled

    def _give_back(self, index: int, kept: int) -> None:
        """Return the memory of all positions of a row but the first ``kept``."""
        head_bytes = self._row_bytes // self.shape.heads
        kept_bytes = kept * head_bytes // self.shape.capacity
        for tensor in range(len(self.tensors)):
            for head in range(self.shape.heads):
                start = tensor * self._tensor_bytes + index * self._row_bytes + head * head_bytes
                _release(self._memory, start + kept_bytes, start + head_bytes)


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many leading tokens two sequences share."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return next(index for index in range(limit) if one[index] != other[index])


def _reserve(size: int) -> mmap.mmap:
    """Zeroed address space that takes no memory until written."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would be taken whole for one position
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def _release(memory: mmap.mmap, start: int, stop: int) -> None:
    """Give back the pages that lie wholly within [start, stop)."""
    first, last = _whole_pages(start), stop // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
