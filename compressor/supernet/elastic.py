"""The elastic model: sub-networks switched on in place, sharing the super-network's weights.

A width is a prefix of the MLP's sorted neurons; a depth is a choice of layers. Nothing is copied, so
that gradients of a sub-network land in the super-network's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from compressor.models import shape_of_config
from compressor.space import ModelShape, SubNetwork
from compressor.supernet.sliced import SlicedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


class Elastic:
    """Switches sub-networks of a LLaMA-like model on and off, in place.

    While a sub-network is active, the model's own attributes describe it: ``model.model.layers`` holds
    its layers, each ``mlp.gate_proj.weight`` is a view of its first neurons, the configuration gives its
    depth, and attention layers are numbered from 0 for the cache. Any code that reads or runs the
    model therefore sees the sub-network alone. Save the model's weights only after ``reset``.
    """

    def __init__(
        self, model: PreTrainedModel, prepare: Callable[[SubNetwork], None] = lambda _: None
    ) -> None:
        """``prepare`` is called with each sub-network before it is made active."""
        self.model = model
        self._prepare = prepare
        self.shape: ModelShape = shape_of_config(model.config)
        self.active: SubNetwork | None = None
        self._layers: nn.ModuleList = model.model.layers
        self._linears = [{name: getattr(layer.mlp, name) for name in MLP_LINEARS} for layer in self._layers]
        self._layer_types: list[str] | None = getattr(model.config, "layer_types", None)

    def activate(self, subnet: SubNetwork) -> PreTrainedModel:
        """Make the model compute ``subnet``; returns the model. Raises ``ValueError`` if it does not fit."""
        self._check(subnet)
        self._prepare(subnet)
        for index, width in zip(subnet.layers, subnet.widths, strict=True):
            self._set_width(index, width)
        self._set_layers(subnet.layers)
        self.active = subnet
        return self.model

    def reset(self) -> PreTrainedModel:
        """Make the model compute the whole super-network again; returns the model."""
        for index in range(len(self._layers)):
            self._set_width(index, self.shape.intermediate_size)
        self._set_layers(tuple(range(len(self._layers))))
        self.active = None
        return self.model

    @contextmanager
    def activated(self, subnet: SubNetwork) -> Iterator[PreTrainedModel]:
        """The sub-network within the block, what was active before after it."""
        before = self.active
        try:
            yield self.activate(subnet)
        finally:
            self.reset()
            if before is not None:
                self.activate(before)

    def replace_linears(self, replacement: Callable[[Any], nn.Module]) -> None:
        """Put ``replacement(linear)`` in place of every linear of attention and MLPs.

        One that is no ``nn.Linear`` must have ``sliced(rows, columns)``, a module for its top-left part.
        """
        self.reset()
        layer: Any
        for layer, linears in zip(self._layers, self._linears, strict=True):
            for name in ATTENTION_LINEARS:
                setattr(layer.self_attn, name, replacement(getattr(layer.self_attn, name)))
            for name in MLP_LINEARS:
                linears[name] = replacement(linears[name])
                setattr(layer.mlp, name, linears[name])

    def _check(self, subnet: SubNetwork) -> None:
        known = set(range(len(self._layers)))
        if not subnet.layers or not set(subnet.layers) <= known:
            raise ValueError(f"layers {subnet.layers} are not layers of a model with {len(known)}")
        if not all(1 <= width <= self.shape.intermediate_size for width in subnet.widths):
            raise ValueError(f"widths {subnet.widths} exceed {self.shape.intermediate_size} neurons")

    def _set_width(self, index: int, width: int) -> None:
        mlp, linears = self._layers[index].mlp, self._linears[index]
        whole = width == self.shape.intermediate_size
        for name, linear in linears.items():
            rows = linear.out_features if name == "down_proj" else width
            columns = width if name == "down_proj" else linear.in_features
            setattr(mlp, name, linear if whole else _sliced(linear, rows, columns))

    def _set_layers(self, layers: tuple[int, ...]) -> None:
        config: Any = self.model.config
        whole = len(layers) == len(self._layers)
        kept = self._layers if whole else nn.ModuleList(self._layers[i] for i in layers)
        self.model.model.layers = kept
        config.num_hidden_layers = len(layers)
        if self._layer_types is not None:
            config.layer_types = [self._layer_types[i] for i in layers]
        layer: Any
        for position, layer in enumerate(kept):
            layer.self_attn.layer_idx = position


def _sliced(linear: Any, rows: int, columns: int) -> nn.Module:
    if isinstance(linear, nn.Linear):
        return SlicedLinear(linear, rows, columns)
    narrowed: nn.Module = linear.sliced(rows, columns)
    return narrowed
