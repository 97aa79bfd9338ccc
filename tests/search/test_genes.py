"""The vectorised genotypes say what the search space itself says."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.search.evolution import mutated
from compressor.search.genes import GeneTable, keys, unique_rows
from compressor.space import ModelShape, SearchSpace
from tests.search.synthetic import MIXED, SPACE

SMALL = SearchSpace(ModelShape(64, 96, 4, 4, 2, 16, 100), (2, 4), (32, 96), (1, 3, 0, 2), (4, 8))


@pytest.mark.parametrize("space", [SPACE, MIXED, SMALL])
def test_canonical_rows_are_the_spaces_canonical_genotypes(space):
    rng = np.random.default_rng(0)
    raw = rng.integers(space.choices, size=(200, len(space.choices)))
    expected = [space.canonical([int(g) for g in row]) for row in raw]
    assert [tuple(row) for row in GeneTable(space).canonical(raw)] == expected


@pytest.mark.parametrize("space", [SPACE, MIXED])
def test_encode_and_decode_are_inverse(space):
    table = GeneTable(space)
    genes = table.sample(50, np.random.default_rng(1))
    assert np.array_equal(table.encode(table.decode(row) for row in genes), genes)


def test_everything_is_every_distinct_subnetwork_once():
    table = GeneTable(SMALL)
    genes = table.everything()
    assert len(genes) == len(set(keys(genes))) == SMALL.num_distinct


def test_equal_architectures_have_equal_features_and_others_differ():
    table = GeneTable(SMALL)
    genes = table.everything()
    features = table.features(genes)
    assert len(np.unique(features.round(9), axis=0)) == len(genes)
    raw = genes[genes[:, 0] == 0][:1].copy()
    raw[0, 1 + 1] = 0  # a width gene of a dropped layer
    assert np.array_equal(table.features(table.canonical(raw)), table.features(genes[genes[:, 0] == 0][:1]))


def test_unique_rows_keep_the_order_of_first_appearance():
    rows = np.array([[2, 0], [1, 0], [2, 0], [0, 5]])
    assert unique_rows(rows).tolist() == [[2, 0], [1, 0], [0, 5]]


def test_mutation_changes_every_row_and_reaches_every_value():
    """The published code's polynomial mutation with rounding never flips a gene of two values."""
    choices = np.array([3, 2, 2, 1])
    genes = np.zeros((600, 4), dtype=np.int64)
    found = mutated(genes, choices, np.random.default_rng(0))
    assert np.all((found != genes).any(axis=1))
    assert [set(column) for column in found.T] == [{0, 1, 2}, {0, 1}, {0, 1}, {0}]
    assert 1.0 <= (found != genes).sum(axis=1).mean() < 2.2
