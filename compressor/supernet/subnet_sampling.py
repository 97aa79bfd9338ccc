"""Which networks a training step takes."""

from __future__ import annotations

from typing import Literal

import numpy as np

from compressor.space import SearchSpace, SubNetwork, parameter_count

Sampling = Literal["genes", "size", "small", "budget"]
Recipe = Literal["alternate", "sandwich"]
Network = tuple[str, SubNetwork]
"""``super`` or ``sub``, and the sub-network."""

BUDGET_REACH = 0.12
"""How far below the budget ``budget`` samples, as a share of it."""

DRAWS = 32
"""Candidates among which the one nearest to the wanted size is taken."""


def networks_of_step(
    space: SearchSpace,
    recipe: Recipe,
    super_every: int,
    sampling: Sampling,
    step: int,
    rng: np.random.Generator,
    budget_parameters: int | None = None,
) -> list[Network]:
    """The networks whose gradients make up one step.

    ``alternate`` takes one: the super-network every ``super_every`` steps (0: never; 2: InstaTune, arXiv
    2308.15609), a random sub-network otherwise. ``sandwich`` takes the largest, the smallest and two
    random ones (Yu & Huang, arXiv 1903.05134).
    """
    if recipe == "sandwich":
        middle: list[Network] = [
            ("sub", sample_subnet(space, sampling, rng, budget_parameters)) for _ in range(2)
        ]
        return [("super", space.largest), ("sub", space.smallest), *middle]
    if super_every > 0 and step % super_every == 0:
        return [("super", space.largest)]
    return [("sub", sample_subnet(space, sampling, rng, budget_parameters))]


def sample_subnet(
    space: SearchSpace, sampling: Sampling, rng: np.random.Generator, budget_parameters: int | None = None
) -> SubNetwork:
    """``genes``: uniform in genes. ``size``: uniform in parameters. ``small``: in the smaller half of sizes.

    ``budget``: up to ``BUDGET_REACH`` below ``budget_parameters``, where a search within that budget ends.
    Uniform genes crowd around the mean size: with 30 layers hardly any sample is near the smallest.
    """
    if sampling == "genes":
        return space.sample(rng)
    low = parameter_count(space.shape, space.smallest)
    high = parameter_count(space.shape, space.largest)
    if sampling == "budget" and budget_parameters is not None:
        high = min(high, max(low, budget_parameters))
        low = max(low, int((1 - BUDGET_REACH) * high))
    reach = 0.5 if sampling == "small" else 1.0
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
