"""Sub-networks drawn before anything is known: feasible, spread over size, never one seen before."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from compressor.search.problem import Problem
from compressor.space import SearchSpace, SubNetwork

MAX_TRIES = 200
"""Draws before a sampler gives up on finding another unseen, feasible sub-network."""


def first_population(problem: Problem, count: int, rng: np.random.Generator) -> list[SubNetwork]:
    """Up to ``count`` feasible sub-networks: the extremes, uniform widths, then one a stratum of size.

    Uniform-width networks take at most half of the places. In every second stratum, the largest among
    them, layers are as wide as their rank says, in the others at random. Fewer come back only if there are
    no more.
    """
    found: dict[str, SubNetwork] = {}

    def add(subnet: SubNetwork) -> None:
        if len(found) < count and problem.allows(subnet):
            found.setdefault(subnet.digest, subnet)

    smallest, largest = extremes(problem, rng)
    add(largest)
    add(smallest)
    uniform = [s for s in problem.space.uniform_subnetworks() if problem.allows(s)]
    for index in rng.permutation(len(uniform))[: max(0, count // 2 - 2)]:
        add(uniform[index])
    low, high = problem.size(smallest), problem.size(largest)
    strata = max(1, count - len(found))
    for place in range(strata):
        target = low + (high - low) * (place + rng.random()) / strata
        ranked = (strata - place) % 2 == 1
        add(ranked_to(problem, target, rng) if ranked else filled_to(problem, target, rng))
    for subnet in unseen(problem, count - len(found), found, rng):
        add(subnet)
    return list(found.values())


def unseen(problem: Problem, count: int, seen: Collection[str], rng: np.random.Generator) -> list[SubNetwork]:
    """Up to ``count`` feasible sub-networks whose digests are not in ``seen``, spread over size."""
    smallest, largest = extremes(problem, rng)
    low, high = problem.size(smallest), problem.size(largest)
    found: dict[str, SubNetwork] = {}
    for _ in range(MAX_TRIES + count):
        if len(found) >= count:
            break
        subnet = filled_to(problem, float(rng.uniform(low, high * (1 + 1e-9))), rng)
        if subnet.digest not in seen and problem.allows(subnet):
            found.setdefault(subnet.digest, subnet)
    return list(found.values())


def extremes(problem: Problem, rng: np.random.Generator) -> tuple[SubNetwork, SubNetwork]:
    """The smallest feasible sub-network, and a largest one."""
    space = problem.space
    feasible = [d for d in space.depths if problem.allows(_least(space, d))]
    if not feasible:
        return space.smallest, space.smallest
    if problem.allows(space.largest):
        return _least(space, feasible[0]), space.largest
    full = [filled_to(problem, np.inf, rng, depth) for depth in feasible]
    return _least(space, feasible[0]), max(full, key=problem.size)


def filled_to(
    problem: Problem, target: float, rng: np.random.Generator, depth: int | None = None
) -> SubNetwork:
    """A random sub-network of about the size ``target`` (by ``problem.size``) that meets the constraints.

    Starts from the least of a random depth and raises random layers to random widths and bits while
    the size stays within the target and the constraints hold. May be infeasible only if the least of
    every depth is.
    """
    space = problem.space
    if depth is None:
        depth = int(rng.choice(_fitting_depths(problem, target)))
    current = _least(space, depth)
    raised = [(int(rng.choice(space.widths)), int(rng.choice(space.bits))) for _ in range(depth)]
    if target > _reachable(problem, depth, raised):
        raised = [(space.widths[-1], space.bits[-1])] * depth
    current = _with_outer(problem, current, int(rng.choice(space.outer_bits)), target)
    for position in rng.permutation(depth):
        trial = _with_layer(current, int(position), *raised[position])
        if problem.size(trial) <= target and problem.allows(trial):
            current = trial
    return current


def ranked_to(problem: Problem, target: float, rng: np.random.Generator) -> SubNetwork:
    """Of a random depth that the size ``target`` allows, the layers to be dropped last the widest.

    A layer that could be dropped whole at little loss loses little by a narrow MLP. Where bits can be
    chosen, every layer gets its neurons before any gets more bits, and no layer is dropped for bits: those
    cost less accuracy than the bytes of neurons or layers do.
    """
    space = problem.space
    depths = _fitting_depths(problem, target, space.bits[0]) or _fitting_depths(problem, target)[-1:]
    current = _least(space, int(rng.choice(depths)))
    current = _with_outer(problem, current, int(rng.choice(space.outer_bits)), target)
    ranked = [current.layers.index(layer) for layer in reversed(space.drop_order) if layer in current.layers]
    for bits, position in itertools.product(space.bits, ranked):
        for width in (w for w in reversed(space.widths) if w >= current.widths[position]):
            trial = _with_layer(current, position, width, bits)
            if problem.size(trial) <= target and problem.allows(trial):
                current = trial
                break
    return current


def _fitting_depths(problem: Problem, target: float, bits: int | None = None) -> list[int]:
    """Depths at which the target size can be met with layers of at most ``bits`` (all that the space has).

    Where there is none: the smallest depth that the constraints allow, unless ``bits`` are given.
    """
    space = problem.space
    allowed = [d for d in space.depths if problem.allows(_least(space, d))] or [space.depths[0]]
    fitting = [
        d
        for d in allowed
        if problem.size(_least(space, d))
        <= target
        <= problem.size(space.uniform(d, space.widths[-1], bits or space.bits[-1], space.outer_bits[-1]))
    ]
    return fitting or (allowed[:1] if bits is None else [])


def _reachable(problem: Problem, depth: int, raised: list[tuple[int, int]]) -> float:
    layers = problem.space.uniform(depth, problem.space.widths[0]).layers
    widths, bits = zip(*raised, strict=True)
    return problem.size(SubNetwork(layers, widths, bits, (problem.space.outer_bits[-1],) * 2))


def _least(space: SearchSpace, depth: int) -> SubNetwork:
    return space.uniform(depth, space.widths[0], space.bits[0], space.outer_bits[0])


def _with_outer(problem: Problem, subnet: SubNetwork, bits: int, target: float) -> SubNetwork:
    """With embeddings and head in so many bits, where the target size and the constraints leave room."""
    trial = replace(subnet, outer=(bits, bits))
    return trial if problem.size(trial) <= target and problem.allows(trial) else subnet


def _with_layer(subnet: SubNetwork, position: int, width: int, bits: int) -> SubNetwork:
    widths, all_bits = list(subnet.widths), list(subnet.bits)
    widths[position], all_bits[position] = width, bits
    return replace(subnet, widths=tuple(widths), bits=tuple(all_bits))
