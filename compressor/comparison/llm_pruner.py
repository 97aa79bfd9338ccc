"""LLM-Pruner: attention groups and MLP neurons of the least first-order effect, taken from each middle layer.

Source: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models" (arXiv 2305.11627):
coupled structures are removed together, by the sum of |weight × gradient| over the weights that they
consist of (its element-wise, first-order Taylor importance), by one share in every layer that is pruned.
The first and last layers stay whole, as in the authors' settings (of LLaMA-7B's 32 the first 4, the last 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
"""A block's projections; the last reads what the others write."""

WHOLE_AT_START, WHOLE_AT_END = 4 / 32, 2 / 32
SHARES = 1000
"""Steps in which the pruned share is looked for."""


@dataclass(frozen=True)
class Importance:
    """Of one layer: ``groups`` (key-value heads,), each a key-value head with its query heads, and
    ``neurons`` (intermediate_size,) of the MLP."""

    groups: Tensor
    neurons: Tensor


def prune(model: PreTrainedModel, batches: Sequence[Tensor], parameters: int) -> PreTrainedModel:
    """Prune in place until the model has at most ``parameters``; returns it.

    ``batches`` of token ids (batch, length) are what importance is taken on. Query heads that share a
    key-value head go together, as grouped-query attention needs the same number for each. Raises
    ``InputError`` for a size that pruning the middle layers cannot reach.
    """
    middle = middle_layers(len(model.model.layers))
    groups, neurons = _widths(model, middle, parameters)
    scores = rank(model, batches, middle)
    for index, score in scores.items():
        layer: Any = model.model.layers[index]
        _keep_groups(layer.self_attn, _largest(score.groups, groups))
        _keep_neurons(layer.mlp, _largest(score.neurons, neurons))
    return model


def middle_layers(count: int) -> range:
    """The layers that are pruned, of so many."""
    return range(round(WHOLE_AT_START * count), count - round(WHOLE_AT_END * count))


def rank(model: PreTrainedModel, batches: Sequence[Tensor], layers: Sequence[int]) -> dict[int, Importance]:
    """Importance of these layers' groups and neurons, from the gradients of the language-model loss."""
    chosen = {id(p) for index in layers for p in model.model.layers[index].parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        for ids in batches:
            ids = ids.to(model.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
            loss.backward()
        return {index: _importance(model.model.layers[index]) for index in layers}
    finally:
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)


def _importance(layer: Any) -> Importance:
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    rows = [_salience(linear).sum(1) for linear in (attention.k_proj, attention.v_proj)]
    per_query = _salience(attention.q_proj).sum(1) + _salience(attention.o_proj).sum(0)
    count = len(rows[0]) // dim
    groups = per_query.view(count, -1).sum(1) + sum(row.view(count, dim).sum(1) for row in rows)
    neurons = sum(_salience(linear).sum(1) for linear in (mlp.gate_proj, mlp.up_proj))
    return Importance(groups, neurons + _salience(mlp.down_proj).sum(0))


def _salience(linear: nn.Linear) -> Tensor:
    assert linear.weight.grad is not None
    return (linear.weight.detach() * linear.weight.grad).float().abs()


def _widths(model: PreTrainedModel, layers: Sequence[int], parameters: int) -> tuple[int, int]:
    """Groups and neurons that each pruned layer keeps: one share of both, to the nearest group, and then
    as many neurons as the size allows."""
    layer: Any = model.model.layers[layers[0]]
    attention, mlp = layer.self_attn, layer.mlp
    all_groups = attention.k_proj.out_features // attention.head_dim
    all_neurons = mlp.gate_proj.out_features
    group = _prunable(attention, ATTENTION) // all_groups
    neuron = _prunable(mlp, MLP) // all_neurons
    excess = model.num_parameters() - parameters
    for step in range(SHARES):
        kept = 1 - step / SHARES
        groups, neurons = max(1, round(all_groups * kept)), max(1, round(all_neurons * kept))
        saved = len(layers) * ((all_groups - groups) * group + (all_neurons - neurons) * neuron)
        if saved >= excess:
            spare = (saved - excess) // (len(layers) * neuron)
            return groups, min(all_neurons, neurons + spare)
    raise InputError(
        f"LLM-Pruner cannot reach {parameters / 1e6:.1f}M parameters: it prunes {len(layers)} of "
        f"{len(model.model.layers)} layers, and nothing else"
    )


def _prunable(block: nn.Module, names: Sequence[str]) -> int:
    """Parameters that go with a block's groups or neurons: all but the bias of its last projection."""
    linears: list[nn.Linear] = [getattr(block, name) for name in names]
    biases = [linear.bias for linear in linears[:-1] if linear.bias is not None]
    return sum(linear.weight.numel() for linear in linears) + sum(bias.numel() for bias in biases)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` largest, in order."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _keep_groups(attention: Any, groups: Tensor) -> None:
    count = attention.k_proj.out_features // attention.head_dim
    for name in ATTENTION:
        linear: nn.Linear = getattr(attention, name)
        size = linear.in_features if name == "o_proj" else linear.out_features
        kept = torch.arange(size, device=groups.device).view(count, -1)[groups].flatten()
        setattr(attention, name, _cut(linear, kept, inputs=name == "o_proj"))


def _keep_neurons(mlp: Any, neurons: Tensor) -> None:
    for name in MLP:
        setattr(mlp, name, _cut(getattr(mlp, name), neurons, inputs=name == "down_proj"))


@torch.no_grad()
def _cut(linear: nn.Linear, kept: Tensor, inputs: bool) -> nn.Linear:
    """The linear with these rows alone, or with these columns."""
    weight = linear.weight[:, kept] if inputs else linear.weight[kept]
    rows, columns = weight.shape
    cut = nn.Linear(columns, rows, bias=linear.bias is not None, device="meta", dtype=weight.dtype)
    cut.weight = nn.Parameter(weight.clone())
    if linear.bias is not None:
        cut.bias = nn.Parameter((linear.bias if inputs else linear.bias[kept]).clone())
    return cut
