"""Which networks a training step takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compressor.space import SearchSpace, SubNetwork, parameter_count

Sampling = Literal["genes", "size", "small", "budget"]
Recipe = Literal["alternate", "sandwich"]
Network = tuple[str, SubNetwork]
"""``super`` or ``sub``, and the sub-network."""

BUDGET_REACH = 0.12
"""How far below the budget ``budget`` samples, as a share of it."""

BITS_TILT = (-8.0, 0.0)
"""Layers learn in few bits more often than in many: rounding is what they have to learn."""

DRAWS = 32
"""Candidates among which the one nearest to the wanted size is taken."""


def networks_of_step(
    space: SearchSpace,
    recipe: Recipe,
    super_every: int,
    sampling: Sampling,
    step: int,
    rng: np.random.Generator,
    budget: float | None = None,
    size: Callable[[SubNetwork], float] | None = None,
) -> list[Network]:
    """The networks whose gradients make up one step.

    ``alternate`` takes one: the super-network every ``super_every`` steps (0: never; 2: InstaTune, arXiv
    2308.15609), a random sub-network otherwise. ``sandwich`` takes the largest, the smallest and two
    random ones (Yu & Huang, arXiv 1903.05134).
    """
    if recipe == "sandwich":
        middle: list[Network] = [("sub", sample_subnet(space, sampling, rng, budget, size)) for _ in range(2)]
        return [("super", space.largest), ("sub", space.smallest), *middle]
    if super_every > 0 and step % super_every == 0:
        return [("super", space.largest)]
    return [("sub", sample_subnet(space, sampling, rng, budget, size))]


def sample_subnet(
    space: SearchSpace,
    sampling: Sampling,
    rng: np.random.Generator,
    budget: float | None = None,
    size: Callable[[SubNetwork], float] | None = None,
) -> SubNetwork:
    """``genes``: uniform in genes. ``size``: uniform in size. ``small``: in the smaller half of sizes.

    ``budget``: up to ``BUDGET_REACH`` below ``budget``, where a search within that budget ends. ``size``
    counts parameters unless given. Uniform genes crowd around the mean size: with 30 layers hardly any
    sample is near the smallest.
    """
    if sampling == "genes":
        return space.sample(rng)

    def parameters(subnet: SubNetwork) -> float:
        return float(parameter_count(space.shape, subnet))

    measured = size or parameters
    low, high = measured(space.smallest), measured(space.largest)
    if sampling == "budget" and budget is not None:
        high = min(high, max(low, budget))
        low = max(low, (1 - BUDGET_REACH) * high)
    reach = 0.5 if sampling == "small" else 1.0
    wanted = low + reach * float(rng.random()) * (high - low)
    candidates = [_skewed(space, rng) for _ in range(DRAWS)]
    return min(candidates, key=lambda s: abs(measured(s) - wanted))


def _skewed(space: SearchSpace, rng: np.random.Generator) -> SubNetwork:
    """A sub-network whose genes of widths, and of bits, lean to one side, by tilts that are drawn first."""
    widths = _tilted(len(space.widths), rng.uniform(-3.0, 3.0))
    layers = space.shape.num_layers
    genes = [int(rng.integers(space.choices[0]))]
    genes += [int(g) for g in rng.choice(len(space.widths), size=layers, p=widths)]
    if len(space.bits) > 1:
        bits = _tilted(len(space.bits), rng.uniform(*BITS_TILT))
        genes += [int(g) for g in rng.choice(len(space.bits), size=layers, p=bits)]
    if space.outer_genes:
        outer = _tilted(len(space.outer_bits), rng.uniform(*BITS_TILT))
        genes += [int(g) for g in rng.choice(len(space.outer_bits), size=space.outer_genes, p=outer)]
    return space.decode(genes)


def _tilted(values: int, tilt: float) -> NDArray[np.float64]:
    """Chances [values] that grow by e^tilt from the first to the last."""
    weights = np.exp(tilt * np.linspace(0.0, 1.0, values))
    chances: NDArray[np.float64] = weights / weights.sum()
    return chances
