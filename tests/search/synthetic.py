"""A test function in place of real evaluations: cheap, not additive, with layers that matter unequally."""

from __future__ import annotations

import numpy as np

from compressor.search.problem import ExactConstraint, Objective, Outcome, Problem
from compressor.space import ModelShape, SearchSpace, SubNetwork, flops_per_token, weight_bytes

SHAPE = ModelShape(128, 384, 16, 4, 2, 32, 2000, tie_word_embeddings=True)
SPACE = SearchSpace.from_fractions(SHAPE, [0.75, 0.875, 1.0], [0.5, 1.0])
MIXED = SearchSpace.from_fractions(SHAPE, [0.75, 1.0], [0.5, 0.75, 1.0], bits=(4, 8))


def int8_bytes(subnet: SubNetwork) -> float:
    return float(weight_bytes(SHAPE, subnet, "int8"))


def make_problem(
    space: SearchSpace = SPACE,
    budget_share: float = 1.0,
    limits: dict[str, float] | None = None,
    throughput: bool = False,
) -> Problem:
    """Accuracy against bytes (and throughput), within a share of the full model's bytes."""
    budget = budget_share * int8_bytes(space.full)
    third = (Objective("throughput_tok_s", maximize=True),) if throughput else ()
    return Problem(
        space,
        (Objective("accuracy", maximize=True), Objective("weight_bytes"), *third),
        {"weight_bytes": int8_bytes},
        (ExactConstraint("memory", int8_bytes, budget, "MiB", 2**20),),
        limits or {},
    )


def evaluate(subnet: SubNetwork) -> Outcome:
    """Layers matter by a skewed law, and losses in neighbouring layers add up to more than their sum."""
    rng = np.random.default_rng(7)
    importance = rng.gamma(0.7, size=SHAPE.num_layers)
    lost = np.full(SHAPE.num_layers, 2.0)
    for layer, width, bits in zip(subnet.layers, subnet.widths, subnet.bits, strict=True):
        lost[layer] = (1 - width / SHAPE.intermediate_size) + 0.15 * (bits == 4)
    loss = 0.06 * importance @ lost + 0.05 * lost[1:] @ lost[:-1]
    millions = flops_per_token(SHAPE, subnet) / 1e6
    return Outcome(
        subnet,
        {
            "accuracy": float(np.exp(-loss)),
            "weight_bytes": int8_bytes(subnet),
            "tpot_ms": millions,
            "throughput_tok_s": 1000 / (millions + 0.2 * subnet.depth),
        },
    )
