"""Low-rank adapters that are elastic with the widths: what a large model tunes in place of its weights.

Source: LoRA (Hu et al., arXiv 2106.09685). Every linear layer of attention and MLPs stays frozen and
gets W + alpha/rank · B A. A narrower MLP uses the same prefix of the adapter's factors as of W, so that
all sub-networks share one adapter a layer, as they share the weights. Adapters sit on all linears and
alpha is twice the rank unless given (Biderman et al., arXiv 2405.09673).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from compressor.supernet.config import check_rank
from compressor.supernet.elastic import Elastic
from compressor.supernet.sliced import SlicedLinear


def attach(elastic: Elastic, rank: int, alpha: float, seed: int) -> list[Parameter]:
    """Put an adapter on every linear of attention and MLPs; the adapters' parameters.

    The model computes what it did before. Raises ``InputError`` for a rank that spares nothing.
    """
    check_rank(elastic.shape, rank)
    generator = torch.Generator().manual_seed(seed)
    trained: list[Parameter] = []

    def adapt(linear: nn.Linear) -> LoraLinear:
        adapted = _fresh(linear, rank, alpha / rank, generator)
        trained.extend((adapted.down.weight, adapted.up.weight))
        return adapted

    elastic.replace_linears(adapt)
    return trained


def merge(elastic: Elastic) -> None:
    """Add the adapters to the weights and take them off: a plain model that computes the same."""
    elastic.replace_linears(_merged)


class LoraLinear(nn.Module):
    """A frozen linear layer plus ``up`` of ``down`` of its input; ``down`` gives ``rank`` numbers."""

    def __init__(self, base: Any, down: Any, up: Any, scale: float) -> None:
        super().__init__()
        self.base, self.down, self.up, self.scale = base, down, up, scale
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), a copy: what a plain layer that computes the same would have."""
        added: Tensor = self.up.weight.float() @ self.down.weight.float()
        weight: Tensor = self.base.weight
        return added.mul_(self.scale).add_(weight).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.base(inputs)
        return output.add(self.up(self.down(inputs)), alpha=self.scale)

    def sliced(self, rows: int, columns: int) -> LoraLinear:
        """Its top-left part, through views: ``rows`` outputs of ``columns`` inputs."""
        rank = self.down.out_features
        return LoraLinear(
            SlicedLinear(self.base, rows, columns),
            SlicedLinear(self.down, rank, columns),
            SlicedLinear(self.up, rows, rank),
            self.scale,
        )


def _fresh(linear: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> LoraLinear:
    """An adapter that adds nothing yet: ``down`` random as torch's linear layers start, ``up`` zero.

    Drawn on the CPU, so that a seed gives the same adapters on any device.
    """
    placed: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    down = nn.Linear(linear.in_features, rank, bias=False, **placed)
    up = nn.Linear(rank, linear.out_features, bias=False, **placed)
    bound = 1.0 / math.sqrt(linear.in_features)
    start = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        down.weight.copy_(start)
        up.weight.zero_()
    return LoraLinear(linear, down, up, scale)


@torch.no_grad()
def _merged(adapted: LoraLinear) -> nn.Linear:
    base: nn.Linear = adapted.base
    base.weight.copy_(adapted.weight)
    return base
