"""Which networks a step trains, and how their sizes are spread."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.space import ModelShape, SearchSpace, SubNetwork, parameter_count, weight_bytes
from compressor.supernet.subnet_sampling import Sampling, networks_of_step, sample_subnet

SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49152, tie_word_embeddings=True)
SPACE = SearchSpace(SHAPE, (24, 27, 30), (768, 1152, 1536))


def sizes(sampling: Sampling, count: int = 300) -> np.ndarray:
    """Sizes of samples, 0 for the smallest sub-network and 1 for the largest."""
    rng = np.random.default_rng(0)
    low, high = (parameter_count(SHAPE, s) for s in (SPACE.smallest, SPACE.largest))
    drawn = [parameter_count(SHAPE, sample_subnet(SPACE, sampling, rng)) for _ in range(count)]
    return (np.array(drawn) - low) / (high - low)


def test_sizes_are_spread_as_named() -> None:
    genes, size, small = (sizes(sampling) for sampling in ("genes", "size", "small"))
    assert size.std() > 1.5 * genes.std()
    assert abs(size.mean() - 0.5) < 0.08
    assert np.histogram(size, bins=4, range=(0, 1))[0].min() > 30
    assert (small < 0.55).mean() > 0.95


def test_a_budget_gathers_samples_just_below_it() -> None:
    rng = np.random.default_rng(0)
    full = parameter_count(SHAPE, SPACE.full)
    budget = int(0.8 * full)
    drawn = [parameter_count(SHAPE, sample_subnet(SPACE, "budget", rng, budget)) for _ in range(200)]
    assert 0.6 * full < min(drawn) and max(drawn) < 1.02 * budget
    assert np.mean(drawn) < 0.95 * budget


@pytest.mark.parametrize("sampling", ["genes", "size", "small", "budget"])
def test_samples_are_of_the_space_and_follow_the_seed(sampling: Sampling) -> None:
    first, again = (sample_subnet(SPACE, sampling, np.random.default_rng(7)) for _ in range(2))
    assert first == again
    assert SPACE.contains(first)


def test_bits_are_drawn_too() -> None:
    space = SearchSpace(SHAPE, (30,), (768, 1536), bits=(4, 8))
    rng = np.random.default_rng(0)
    drawn = [bits for _ in range(100) for bits in sample_subnet(space, "size", rng).bits]
    assert set(drawn) == {4, 8} and 0.8 < np.mean(np.array(drawn) == 4) < 0.97


def test_the_size_can_be_another_than_parameters() -> None:
    space = SearchSpace(SHAPE, (27, 30), (768, 1536), bits=(4, 8))

    def size(subnet: SubNetwork) -> float:
        return float(weight_bytes(SHAPE, subnet, "int8"))

    rng = np.random.default_rng(0)
    drawn = [size(sample_subnet(space, "budget", rng, 90e6, size)) for _ in range(100)]
    assert min(drawn) > 75e6 and max(drawn) < 92e6


@pytest.mark.parametrize(("every", "kinds"), [(2, "+-+-+-"), (3, "+--+--"), (0, "------")])
def test_super_network_steps_come_at_their_turn(every: int, kinds: str) -> None:
    rng = np.random.default_rng(0)
    steps = [networks_of_step(SPACE, "alternate", every, "genes", step, rng) for step in range(6)]
    assert "".join("+" if network == "super" else "-" for ((network, _),) in steps) == kinds
    assert all(subnet == SPACE.largest for ((network, subnet),) in steps if network == "super")
