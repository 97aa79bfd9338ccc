"""Which neurons and layers matter: ranked once on calibration text, sorted once, sliced ever after.

Permuting an MLP's neurons leaves the function of the full model unchanged, so the most important ones
can come first and every narrower width is a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.supernet.layer_orders import greedy_order, leave_one_out_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NeuronMetric = Literal["rms", "activation", "magnitude", "taylor", "paper"]
LayerMetric = Literal["block-influence", "leave-one-out", "greedy", "paper"]


@dataclass(frozen=True)
class Importance:
    """``neuron_orders``: for each layer its neurons (intermediate_size,), the most important first.

    ``drop_order``: all layers, the least important first.
    """

    neuron_orders: tuple[Tensor, ...]
    drop_order: tuple[int, ...]
    ordering: str


def rank(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    neurons: NeuronMetric = "rms",
    layers: LayerMetric = "block-influence",
    drops: int | None = None,
) -> Importance:
    """Rank on token ids (batch, length); the model is left as it was.

    Neurons by root mean square activation × norm of their column of the down projection, which is the
    error that removing one alone makes (``rms``: on the starter at half width 12% less divergence than
    the mean |activation| of ``activation``), by the norms of their weights (``magnitude``), or by
    |gradient × activation| (``taylor``). Layers by block influence
    1 − cos(input, output) (ShortGPT, arXiv 2403.03853), by the loss without each one, or greedily.
    ``drops`` is how many layers the greedy search drops (the space's deepest cut).
    ``paper`` keeps the model's own order: the first neurons, the first layers.
    """
    count = len(model.model.layers)
    width = model.config.intermediate_size
    statistics = _Statistics(model)
    if neurons == "taylor":
        statistics.collect_gradients(batches)
    elif neurons in ("rms", "activation") or layers == "block-influence":
        statistics.collect(batches)
    if neurons == "taylor" and layers == "block-influence":
        statistics.collect(batches)
    scores = statistics.neuron_scores(neurons)
    orders = tuple(
        torch.arange(width) if score is None else score.argsort(descending=True, stable=True).cpu()
        for score in scores
    )
    if layers == "paper":
        drop_order = tuple(reversed(range(count)))
    elif layers == "block-influence":
        drop_order = tuple(int(i) for i in statistics.influence.argsort(stable=True))
    elif layers == "leave-one-out":
        drop_order = leave_one_out_order(model, batches)
    else:
        drop_order = greedy_order(model, batches, drops)
    return Importance(orders, drop_order, f"{neurons}+{layers}")


@torch.no_grad()
def sort_neurons(model: PreTrainedModel, importance: Importance) -> None:
    """Permute every MLP's neurons, the most important first. The model's function stays the same."""
    for layer, order in zip(model.model.layers, importance.neuron_orders, strict=True):
        mlp: Any = layer.mlp
        order = order.to(mlp.gate_proj.weight.device)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[order])
            if linear.bias is not None:
                linear.bias.copy_(linear.bias[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])


class _Statistics:
    """Sums over the calibration tokens, gathered by hooks."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = list(model.model.layers)
        width, device = model.config.intermediate_size, model.device
        self._activity = [torch.zeros(width, device=device) for _ in self._layers]
        self._energy = [torch.zeros(width, device=device) for _ in self._layers]
        self._taylor = [torch.zeros(width, device=device) for _ in self._layers]
        self.influence = torch.zeros(len(self._layers))

    @torch.no_grad()
    def collect(self, batches: Sequence[Tensor]) -> None:
        """Mean absolute activations and block influences; no logits are computed."""
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(partial(self._see_neurons, i))
            for i, layer in enumerate(self._layers)
        ]
        handles += [
            layer.register_forward_hook(partial(self._see_layer, i), with_kwargs=True)
            for i, layer in enumerate(self._layers)
        ]
        try:
            for ids in batches:
                self._model.model(ids.to(self._model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def collect_gradients(self, batches: Sequence[Tensor]) -> None:
        """First-order effect of each neuron on the loss (Molchanov et al., arXiv 1906.10771)."""
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(partial(self._see_gradients, i))
            for i, layer in enumerate(self._layers)
        ]
        try:
            for ids in batches:
                ids = ids.to(self._model.device)
                embedded = self._model.model.embed_tokens(ids).detach().requires_grad_()
                loss = self._model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
                torch.autograd.grad(loss, embedded)
        finally:
            for handle in handles:
                handle.remove()

    def neuron_scores(self, metric: NeuronMetric) -> list[Tensor | None]:
        """One score a neuron, the larger the more important; None keeps the model's order."""
        norms = [layer.mlp.down_proj.weight.detach().float().norm(dim=0) for layer in self._layers]
        if metric == "paper":
            return [None] * len(norms)
        if metric == "magnitude":
            return [
                norm
                * layer.mlp.gate_proj.weight.detach().float().norm(dim=1)
                * layer.mlp.up_proj.weight.detach().float().norm(dim=1)
                for norm, layer in zip(norms, self._layers, strict=True)
            ]
        if metric == "taylor":
            return list(self._taylor)
        sizes = [e.sqrt() for e in self._energy] if metric == "rms" else self._activity
        return [size * norm for size, norm in zip(sizes, norms, strict=True)]

    def _see_neurons(self, index: int, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        activations = inputs[0].flatten(0, -2).float()
        self._activity[index] += activations.abs().sum(0)
        self._energy[index] += activations.square().sum(0)

    def _see_gradients(self, index: int, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        activation = inputs[0]

        def hook(gradient: Tensor) -> None:
            effect = (gradient * activation.detach()).float().abs()
            self._taylor[index] += effect.flatten(0, -2).sum(0)

        activation.register_hook(hook)  # type: ignore[no-untyped-call]

    def _see_layer(self, index: int, _module: Any, inputs: Any, options: Any, output: Any) -> None:
        before = inputs[0] if inputs else options["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        similarity = F.cosine_similarity(before.float(), after.float(), dim=-1)
        self.influence[index] += float((1 - similarity).sum())
