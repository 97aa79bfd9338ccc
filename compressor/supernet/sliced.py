"""A part of a linear layer, through views: what an active sub-network computes with."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class SlicedLinear(nn.Module):
    """The top-left part of a linear layer, through views: ``rows`` outputs of ``columns`` inputs."""

    def __init__(self, whole: Any, rows: int, columns: int) -> None:
        super().__init__()
        self.whole = whole
        self.out_features = rows
        self.in_features = columns

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), a view of the whole layer's weight."""
        weight: Tensor = self.whole.weight[: self.out_features, : self.in_features]
        return weight

    @property
    def bias(self) -> Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[: self.out_features]

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)
