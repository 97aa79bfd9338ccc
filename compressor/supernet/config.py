"""What a fine-tuning is, and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from compressor.errors import InputError
from compressor.space import ModelShape, SubNetwork
from compressor.supernet.subnet_sampling import Recipe, Sampling

Loss = Literal["distill", "cross-entropy", "both"]
Teacher = Literal["original", "super"]

LOSSLESS_BITS = 8
"""From so many bits on a layer learns as it is: their rounding changes next to nothing."""
SUPER_EVERY_WITH_LABELS = 2
"""InstaTune's alternation. The super-network itself learns from labels, and would otherwise lose what its
sub-networks' steps take from it; where it is its own teacher it has little to learn."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning, which ends after ``steps`` or ``minutes``, whichever comes first.

    ``loss``: the divergence from the teacher's distribution (``distill``), the cross-entropy of the
    labels, or ``both``: ``alpha`` times the latter plus ``gamma`` times the former. ``teacher``: the frozen
    ``original``, or the ``super`` network as it is at that step. ``budget``: the largest size that fits
    the profile's, for ``sampling="budget"``; in parameters, if ``finetune`` isn't told another size.
    ``batch`` examples a step go through the model in ``accumulation`` parts. The last
    ``held_out`` examples are not trained on: every ``check_every`` steps the smallest sub-network's loss
    on them is taken, and ``patience`` checks without a new best end the tuning.
    ``only`` is the one sub-network that every step takes, instead of the recipe's.
    ``lora_rank`` above 0 tunes adapters of that rank and leaves all weights frozen until they are merged;
    ``lora_alpha`` is their scale times the rank, twice the rank unless given.
    """

    steps: int = 60
    minutes: float = math.inf
    batch: int = 8
    accumulation: int = 1
    lr: float = 3e-4
    loss: Loss = "distill"
    teacher: Teacher = "original"
    temperature: float = 1.0
    alpha: float = 0.5
    gamma: float = 0.5
    recipe: Recipe = "alternate"
    super_every: int = 8
    sampling: Sampling = "small"
    budget: float | None = None
    only: SubNetwork | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_norm: float = 1.0
    train_embeddings: bool = False
    lora_rank: int = 0
    lora_alpha: float | None = None
    gradient_checkpointing: bool = False
    checkpoint_minutes: float = 5.0
    held_out: int = 0
    check_every: int = 50
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "minutes",
            "batch",
            "accumulation",
            "lr",
            "temperature",
            "max_norm",
            "patience",
        ):
            if not getattr(self, name) > 0:
                raise InputError(f"the fine-tuning's {name} must be above 0 (got {getattr(self, name)})")
        if min(self.alpha, self.gamma) < 0 or self.alpha + self.gamma == 0:
            raise InputError(
                "alpha and gamma weigh the two losses: neither may be below 0, and one must be above "
                f"(got {self.alpha:g} and {self.gamma:g})"
            )
        if self.batch % self.accumulation:
            raise InputError(f"a batch of {self.batch} does not split into {self.accumulation} equal parts")
        if self.lora_rank < 0 or (self.lora_rank and not self.adapter_alpha > 0):
            raise InputError(
                f"adapters need a rank and an alpha above 0 (got {self.lora_rank}, {self.adapter_alpha:g})"
            )
        if self.lora_rank and self.train_embeddings:
            raise InputError("adapters leave all weights frozen: don't train the embeddings with them")
        if self.train_embeddings and self.distils:
            raise InputError("distilling compares states before one head: don't train the embeddings with it")

    @property
    def adapter_alpha(self) -> float:
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def distils(self) -> bool:
        return self.loss != "cross-entropy"


@dataclass(frozen=True)
class FinetuneResult:
    """``super_loss`` and ``sub_loss`` are means over the last quarter of each kind's steps, in nats."""

    steps: int
    tokens: int
    seconds: float
    super_loss: float
    sub_loss: float
    resumed_at: int = 0
    stopped_early: bool = False


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Parameters of adapters of that rank on every linear of attention and MLPs."""
    linears = (*shape.attention_matrices(), *shape.mlp_matrices(shape.intermediate_size))
    return shape.num_layers * rank * sum(rows + columns for rows, columns in linears)


def check_rank(shape: ModelShape, rank: int) -> None:
    """Raise ``InputError`` for adapters that would be no smaller than what they adapt."""
    if rank >= shape.hidden_size:
        raise InputError(
            f"adapters of rank {rank} are no smaller than the model's layers ({shape.hidden_size} wide): "
            "lower --lora-rank, or leave it out to tune all weights"
        )
