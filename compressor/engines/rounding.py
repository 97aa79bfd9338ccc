"""A super-network's weights as a package will hold them, so that scoring in PyTorch sees their rounding."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.engines.quantize import dequantize, quantize
from compressor.space import SubNetwork


class RoundedWeights:
    """The matrices of every layer, rounded to each of ``bits``; one set at a time is in the model.

    Rounds the model in place, its embeddings and head to ``outer_bits``, and keeps a copy of its layers for
    each number of bits but the largest. Inputs are not rounded. Blocks run along a matrix's inputs, so that
    widths of whole blocks cut what is rounded as if it had been rounded after.
    """

    def __init__(self, model: PreTrainedModel, bits: Collection[int], outer_bits: int) -> None:
        self._linears = [_linears(layer) for layer in model.model.layers]
        self._weights: dict[int, list[list[Tensor]]] = {each: [] for each in bits}
        for index, linears in enumerate(self._linears):
            for each, layers in self._weights.items():
                layers.append([rounded(linear.weight.detach(), each) for linear in linears])
            self._put(index, max(bits))
        outer: Any
        for outer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            outer.weight.data = rounded(outer.weight.detach(), outer_bits)

    def choose(self, subnet: SubNetwork) -> None:
        """Put each of the sub-network's layers in its bits. Raises ``KeyError`` for bits not given."""
        for index, bits in zip(subnet.layers, subnet.bits, strict=True):
            self._put(index, bits)

    def _put(self, index: int, bits: int) -> None:
        for linear, weight in zip(self._linears[index], self._weights[bits][index], strict=True):
            linear.weight.data = weight


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A matrix [rows, columns] as a package holds it in so many bits, in the matrix's own numerics."""
    with torch.no_grad():
        values = dequantize(*quantize(weight, bits), bits)[:, : weight.shape[1]]
        return values.to(weight.dtype).contiguous()
