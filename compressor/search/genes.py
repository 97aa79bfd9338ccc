"""Genotypes as integer matrices: canonical form, features for predictors, distance-free identity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.space import SearchSpace, SubNetwork

Genes = NDArray[np.int64]
"""(n, genes): one genotype a row."""

Features = NDArray[np.float64]


class GeneTable:
    """The vectorised counterpart of a search space's ``encode``, ``decode`` and ``canonical``."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.choices: Genes = np.array(space.choices, dtype=np.int64)
        self._layers = space.shape.num_layers
        self._has_bits = len(space.bits) > 1
        self._outer_at = len(self.choices) - space.outer_genes
        self._kept = np.zeros((len(space.depths), self._layers), dtype=bool)
        for index, depth in enumerate(space.depths):
            self._kept[index, list(space.uniform(depth, space.widths[0]).layers)] = True

    def encode(self, subnets: Iterable[SubNetwork]) -> Genes:
        rows = [self.space.encode(subnet) for subnet in subnets]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.choices))

    def decode(self, genotype: Sequence[int] | Genes) -> SubNetwork:
        return self.space.decode([int(g) for g in genotype])

    def canonical(self, genes: Genes) -> Genes:
        """The same architectures with the genes of dropped layers at their largest value."""
        dropped = ~self._kept[genes[:, 0]]
        found = genes.copy()
        for start, largest in self._blocks():
            found[:, start : start + self._layers][dropped] = largest
        return found

    def sample(self, count: int, rng: np.random.Generator) -> Genes:
        """(count, genes) canonical genotypes drawn uniformly in genes."""
        return self.canonical(rng.integers(self.choices, size=(count, len(self.choices))))

    def everything(self) -> Genes:
        """Every distinct genotype. Only for small spaces: (``num_encodings``, genes) at its peak."""
        grid = np.indices(self.space.choices).reshape(len(self.choices), -1).T
        return unique_rows(self.canonical(np.ascontiguousarray(grid, dtype=np.int64)))

    def features(self, genes: Genes) -> Features:
        """(n, columns): one-hot genes, zero for dropped layers, and the totals they add up to.

        The totals (depth, neurons kept, mean bits; as shares) are scaled by the root of the number of
        layers, so that a linear model may lean on "less of everything" before it has seen enough to
        tell layers apart; so are the genes of embeddings and head, which weigh as much as many layers.
        """
        kept = self._kept[genes[:, 0]]
        depth = np.eye(len(self.space.depths))[genes[:, 0]]
        columns = [depth]
        totals = [kept.mean(axis=1)]
        for (start, _), values in zip(self._blocks(), (self.space.widths, self.space.bits), strict=False):
            block = genes[:, start : start + self._layers]
            hot = np.eye(len(values))[block] * kept[:, :, None]
            columns.append(hot.reshape(len(genes), -1))
            share = np.array(values) / values[-1]
            totals.append((share[block] * kept).mean(axis=1))
        outer = np.eye(len(self.space.outer_bits)) * np.sqrt(self._layers)
        columns += [outer[genes[:, place]] for place in range(self._outer_at, len(self.choices))]
        columns.append(np.stack(totals, axis=1) * np.sqrt(self._layers))
        return np.concatenate(columns, axis=1)

    def _blocks(self) -> list[tuple[int, int]]:
        """First gene and largest value of the width genes and, where there are any, the bit genes."""
        blocks = [(1, len(self.space.widths) - 1)]
        if self._has_bits:
            blocks.append((1 + self._layers, len(self.space.bits) - 1))
        return blocks


def keys(genes: Genes) -> list[bytes]:
    """A hashable identity of every row; rows must be canonical to stand for architectures."""
    return [row.tobytes() for row in np.ascontiguousarray(genes, dtype=np.int64)]


def unique_rows(genes: Genes) -> Genes:
    """The rows without repeats, in the order of their first appearance."""
    _, first = np.unique(genes, axis=0, return_index=True)
    return genes[np.sort(first)]
