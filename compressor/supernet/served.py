"""What serving makes of a sub-network, so that tuning sees it: its size, and its rounded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from compressor.space import SubNetwork
from compressor.supernet.config import LOSSLESS_BITS
from compressor.supernet.elastic import ATTENTION_LINEARS, MLP_LINEARS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SCALE_RATE = 4.0
"""How many times the learning rate a scale's logarithm learns at."""


class Grid(Protocol):
    """The values that a matrix may take, in blocks along its inputs that have a scale each."""

    @property
    def scales(self) -> Tensor:
        """fp32 [rows, blocks]."""
        ...

    def rounded(self, weight: Tensor) -> Tensor:
        """Weights [rows, columns] at the nearest of those values."""
        ...

    def part(self, rows: int, columns: int) -> Grid:
        """That of a matrix's first rows and columns."""
        ...

    def scaled(self, factors: Tensor) -> Grid:
        """With each scale times a factor [rows, blocks]."""
        ...


@dataclass(frozen=True)
class Served:
    """How a tuning's sub-networks will be served.

    ``size`` of one, in the unit of ``FinetuneConfig.budget``. ``grids`` hold, by its module's name, what each
    matrix of a layer is rounded to where the layer has fewer bits than ``LOSSLESS_BITS``; ``outer``, by their
    bits, the embeddings and the head as they are rounded, which don't learn.
    """

    size: Callable[[SubNetwork], float]
    grids: Mapping[str, Grid] | None = None
    outer: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    shifts: dict[str, Parameter] = field(default_factory=dict)
    """Where scales learn, as they do for one sub-network alone: the logarithm of what each is to be times,
    over ``SCALE_RATE``, by the matrix's name."""

    @property
    def rounds(self) -> bool:
        return bool(self.grids or self.outer)

    def learn_scales(self, model: PreTrainedModel, subnet: SubNetwork) -> None:
        """Let the scales of the active sub-network's matrices learn, from what they are."""
        for name, module in self._rounded_modules(model, subnet):
            assert self.grids is not None
            own = self.grids[name].part(*module.weight.shape).scales
            self.shifts[name] = Parameter(torch.zeros_like(own))

    def grid(self, name: str, weight: Tensor) -> Grid:
        """What an active matrix is rounded to now."""
        assert self.grids is not None
        own = self.grids[name].part(*weight.shape)
        shift = self.shifts.get(name)
        return own if shift is None else own.scaled((SCALE_RATE * shift.detach()).exp())

    @contextmanager
    def weights(self, model: PreTrainedModel, subnet: SubNetwork) -> Iterator[None]:
        """The active sub-network's matrices rounded to its bits within the block, in place.

        Gradients that are taken there belong to the unrounded ones, which are back after it: the
        straight-through estimator (Bengio et al., arXiv 1308.3432). Where scales learn, theirs are taken from
        them as the block ends, and what lies beyond a grid's ends gets none (LSQ, Esser et al., arXiv
        1902.08153). Holds a copy of what is rounded.
        """
        kept: list[tuple[str, Any, Tensor, Grid]] = []
        learning = torch.is_grad_enabled()
        with self._outer_weights(model, subnet):
            try:
                for name, module in self._rounded_modules(model, subnet):
                    weight = module.weight.detach()
                    grid = self.grid(name, weight)
                    kept.append((name, module, weight.clone(), grid))
                    weight.copy_(grid.rounded(weight))
                yield
            finally:
                for name, module, unrounded, grid in kept:
                    if name in self.shifts and learning:
                        self._learn_scale(name, module, unrounded, grid)
                    module.weight.detach().copy_(unrounded)

    @contextmanager
    def _outer_weights(self, model: PreTrainedModel, subnet: SubNetwork) -> Iterator[None]:
        """Embeddings and head rounded within the block, by exchanging what they hold."""
        embed: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        before = embed.weight.data, head.weight.data
        try:
            if subnet.embed_bits in self.outer:
                embed.weight.data = self.outer[subnet.embed_bits][0]
            if subnet.head_bits in self.outer:
                head.weight.data = self.outer[subnet.head_bits][1]
            yield
        finally:
            embed.weight.data, head.weight.data = before

    def _rounded_modules(self, model: PreTrainedModel, subnet: SubNetwork) -> Iterator[tuple[str, Any]]:
        """The active linears that lose something by rounding, by their names in the whole model."""
        if self.grids is None:
            return
        layers: Any = model.model.layers
        for number, layer, bits in zip(subnet.layers, layers, subnet.bits, strict=True):
            if bits < LOSSLESS_BITS:
                for block, names in (("self_attn", ATTENTION_LINEARS), ("mlp", MLP_LINEARS)):
                    for name in names:
                        yield f"model.layers.{number}.{block}.{name}", getattr(getattr(layer, block), name)

    @torch.no_grad()
    def _learn_scale(self, name: str, module: Any, unrounded: Tensor, grid: Grid) -> None:
        whole = getattr(module, "whole", module).weight.grad
        if whole is None:
            return
        rows, columns = unrounded.shape
        gradient = whole[:rows, :columns]
        moved = module.weight.detach() - unrounded
        scales = grid.scales.repeat_interleave(-(-columns // grid.scales.shape[1]), dim=1)[:, :columns]
        beyond = moved.abs() > 0.5001 * scales
        moved.add_(unrounded * beyond).mul_(gradient)
        gradient.masked_fill_(beyond, 0.0)
        shift = self.shifts[name]
        block = -(-columns // shift.shape[1])
        padded = torch.nn.functional.pad(moved, (0, shift.shape[1] * block - columns))
        slope = SCALE_RATE * padded.view(rows, shift.shape[1], block).sum(-1)
        shift.grad = slope if shift.grad is None else shift.grad.add_(slope)
