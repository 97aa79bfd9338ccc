"""Which sub-network a training step takes."""

from __future__ import annotations

from typing import Literal

import numpy as np

from compressor.space import SearchSpace, SubNetwork, parameter_count

Sampling = Literal["genes", "size", "small"]

DRAWS = 12
"""Candidates among which the one nearest to the wanted size is taken."""


def sample_subnet(space: SearchSpace, sampling: Sampling, rng: np.random.Generator) -> SubNetwork:
    """``genes``: uniform in genes. ``size``: uniform in parameters. ``small``: in the smaller half of sizes.

    Uniform genes crowd around the mean size: with 30 layers hardly any sample is near the smallest.
    """
    if sampling == "genes":
        return space.sample(rng)
    low = parameter_count(space.shape, space.smallest)
    high = parameter_count(space.shape, space.largest)
    reach = 1.0 if sampling == "size" else 0.5
    wanted = low + reach * float(rng.random()) * (high - low)
    candidates = [_skewed(space, rng) for _ in range(DRAWS)]
    return min(candidates, key=lambda s: abs(parameter_count(space.shape, s) - wanted))


def _skewed(space: SearchSpace, rng: np.random.Generator) -> SubNetwork:
    """A sub-network whose width genes lean to one side, by a tilt that is drawn first."""
    tilt = float(rng.uniform(-3.0, 3.0))
    weights = np.exp(tilt * np.linspace(0.0, 1.0, len(space.widths)))
    chances = weights / weights.sum()
    layers = space.shape.num_layers
    genes = [int(rng.integers(space.choices[0]))]
    genes += [int(g) for g in rng.choice(len(space.widths), size=layers, p=chances)]
    genes += [int(rng.integers(n)) for n in space.choices[1 + layers :]]
    return space.decode(genes)
