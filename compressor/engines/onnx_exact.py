"""Which matrices of an INT8 package read their inputs in two passes, to predict as its sub-network does.

MatMulNBits rounds inputs to INT8 before it multiplies, which is most of what an INT8 package gets wrong.
Two passes undo that (``onnx_graph``) at the price of time, so only as many matrices take them as the bound
asks for: those first that gain the most for their size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compressor.space import QUANT_BLOCK, ModelShape, SubNetwork

TARGET_NATS = 0.02
"""Mean divergence, nats a token, that a package may have from what its rounded weights say."""
PARTS = 4
"""Layers are tried in so many consecutive parts, for each kind of matrix."""

Group = tuple[str, ...]
Divergence = Callable[[Sequence[str]], float]
"""The mean divergence, nats a token, where the named matrices read their inputs in two passes."""


@dataclass(frozen=True)
class Exactness:
    """Matrices that read their inputs in two passes, and the mean divergence that is left, nats a token:
    from what the rounded weights say; ``rounding_nats`` is theirs from what unrounded ones say."""

    fine_inputs: tuple[str, ...]
    divergence_nats: float
    rounding_nats: float = 0.0


def choose_exactness(
    shape: ModelShape, subnet: SubNetwork, divergence: Divergence, target: float
) -> Exactness:
    """The cheapest choice within ``target``; nothing is chosen where none suffices.

    Where one pass is enough that is one call of ``divergence``, else up to two dozen.
    """
    plain = Exactness((), divergence(()))
    if plain.divergence_nats <= target:
        return plain
    sizes = _groups(shape, subnet)
    everything = Exactness(_names(list(sizes)), divergence(_names(list(sizes))))
    if not everything.divergence_nats <= target:
        return plain
    gains = {group: (plain.divergence_nats - divergence(group)) / size for group, size in sizes.items()}
    order = sorted(sizes, key=lambda group: gains[group], reverse=True)
    return _shortest(order, divergence, target, everything)


def _shortest(
    order: Sequence[Group], divergence: Divergence, target: float, everything: Exactness
) -> Exactness:
    """The shortest beginning of ``order`` within the target, by bisection; all of it is within."""
    too_few, enough, best = 0, len(order), everything
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        names = _names(order[:middle])
        tried = Exactness(names, divergence(names))
        if tried.divergence_nats <= target:
            enough, best = middle, tried
        else:
            too_few = middle
    return best


def _groups(shape: ModelShape, subnet: SubNetwork) -> Mapping[Group, int]:
    """Matrices that are tried together, and how many weights they have.

    Two passes need inputs of whole blocks, so matrices with others are left out.
    """
    *qkv, o = shape.attention_matrices()
    found: dict[Group, int] = {("head",): shape.vocab_size * shape.hidden_size}
    for part in _parts(subnet.depth):
        for names, matrices in (
            (("qkv",), lambda _: qkv),
            (("o",), lambda _: (o,)),
            (("gate", "up"), lambda width: shape.mlp_matrices(width)[:2]),
            (("down",), lambda width: shape.mlp_matrices(width)[2:]),
        ):
            whole = [i for i in part if matrices(subnet.widths[i])[0][1] % QUANT_BLOCK[subnet.bits[i]] == 0]
            if whole:
                group = tuple(f"layers.{i}.{name}" for i in whole for name in names)
                found[group] = sum(n * k for i in whole for n, k in matrices(subnet.widths[i]))
    return found


def _parts(depth: int) -> list[range]:
    bounds = [depth * part // PARTS for part in range(PARTS + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds) if start < end]


def _names(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(name for group in groups for name in group)
