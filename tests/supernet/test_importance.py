"""Ranking and sorting: the model's function stays, the useless goes last."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import pytest
import torch
from torch import Tensor

from compressor.space import SubNetwork
from compressor.supernet.elastic import Elastic
from compressor.supernet.importance import LayerMetric, NeuronMetric, rank, sort_neurons

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.mark.parametrize("metric", get_args(NeuronMetric))
@torch.no_grad()
def test_sorting_leaves_the_logits_unchanged(
    family_model: PreTrainedModel, ids: Tensor, metric: NeuronMetric
) -> None:
    before = family_model(ids).logits
    with torch.enable_grad():
        importance = rank(family_model, [ids], neurons=metric)
    sort_neurons(family_model, importance)
    moved = any(not torch.equal(order, torch.arange(64)) for order in importance.neuron_orders)
    assert moved == (metric != "paper")
    assert (family_model(ids).logits - before).abs().max() < 1e-4


@pytest.mark.parametrize("metric", ["rms", "activation", "magnitude", "taylor"])
def test_dead_neurons_come_last(model: PreTrainedModel, ids: Tensor, metric: NeuronMetric) -> None:
    dead = torch.tensor([0, 5, 9])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, dead] = 0
    importance = rank(model, [ids], neurons=metric)
    for order in importance.neuron_orders:
        assert set(order[-3:].tolist()) == set(dead.tolist())


@pytest.mark.parametrize("metric", ["block-influence", "leave-one-out", "greedy"])
def test_layers_that_do_nothing_are_dropped_first(
    model: PreTrainedModel, ids: Tensor, metric: LayerMetric
) -> None:
    with torch.no_grad():
        for index in (1, 2):
            model.model.layers[index].mlp.down_proj.weight.zero_()
            model.model.layers[index].self_attn.o_proj.weight.zero_()
    order = rank(model, [ids], layers=metric, drops=2).drop_order
    assert set(order[:2]) == {1, 2}
    assert sorted(order) == [0, 1, 2, 3]


def test_greedy_sees_layers_that_stand_in_for_each_other(model: PreTrainedModel, ids: Tensor) -> None:
    """Two layers share one tiny step: either may go, so that leaving one out calls both useless."""
    elastic = Elastic(model)
    order = rank(model, [ids], layers="greedy", drops=3).drop_order
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)

        def loss(kept: tuple[int, ...]) -> float:
            with elastic.activated(SubNetwork(kept, (64,) * len(kept))):
                found = model(ids).logits.log_softmax(-1)
            return float((wanted.exp() * (wanted - found)).sum(-1).mean())

        first = order[0]
        rest = [i for i in range(4) if i != first]
        pairs = {gone: loss(tuple(i for i in rest if i != gone)) for gone in rest}
    assert order[1] == min(pairs, key=lambda gone: pairs[gone])


def test_paper_order_keeps_the_first(model: PreTrainedModel, ids: Tensor) -> None:
    importance = rank(model, [ids], "paper", "paper")
    assert importance.drop_order == (3, 2, 1, 0)
    assert all(torch.equal(order, torch.arange(64)) for order in importance.neuron_orders)
    assert importance.ordering == "paper+paper"


def test_ranking_leaves_no_trace(model: PreTrainedModel, ids: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rank(model, [ids], "taylor", "block-influence")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
