"""What serving makes of a sub-network, so that tuning sees it: its size, and its rounded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.space import SubNetwork
from compressor.supernet.config import LOSSLESS_BITS
from compressor.supernet.elastic import ATTENTION_LINEARS, MLP_LINEARS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Served:
    """How a tuning's sub-networks will be served.

    ``size`` of one, in the unit of ``FinetuneConfig.budget``; ``rounded`` gives a matrix [rows, columns] as
    a package holds it in so many bits.
    """

    size: Callable[[SubNetwork], float]
    rounded: Callable[[Tensor, int], Tensor] | None = None

    @contextmanager
    def weights(self, model: PreTrainedModel, subnet: SubNetwork) -> Iterator[None]:
        """The active sub-network's matrices rounded to its bits within the block, in place.

        Gradients that are taken there belong to the unrounded ones, which are back after it: the
        straight-through estimator (Bengio et al., arXiv 1308.3432). Holds a copy of what is rounded.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            if self.rounded is not None:
                layer: Any
                for layer, bits in zip(model.model.layers, subnet.bits, strict=True):
                    for weight in _matrices(layer) if bits < LOSSLESS_BITS else ():
                        kept.append((weight, weight.clone()))
                        weight.copy_(self.rounded(weight, bits))
            yield
        finally:
            for weight, unrounded in kept:
                weight.copy_(unrounded)


@torch.no_grad()
def _matrices(layer: Any) -> list[Tensor]:
    parts = [(layer.self_attn, ATTENTION_LINEARS), (layer.mlp, MLP_LINEARS)]
    return [getattr(block, name).weight.detach() for block, names in parts for name in names]
