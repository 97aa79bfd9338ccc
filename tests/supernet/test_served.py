"""Tuning sees sub-networks as they are served: rounded to their bits, and of their size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from compressor.engines.quantize import Grid, quantize
from compressor.engines.rounding import layer_linears
from compressor.errors import InputError
from compressor.models import shape_of_config
from compressor.space import SearchSpace, SubNetwork
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, finetune
from compressor.supernet.losses import distillation
from compressor.supernet.served import SCALE_RATE, Served
from compressor.supernet.targets import final_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUBNET = SubNetwork((0, 2, 3), (32, 64, 32), (4, 8, 4))


def served(model: PreTrainedModel, outer: bool = False) -> Served:
    """Every matrix of a layer on its nearest grid, and, if asked, embeddings and head in 4 bits."""
    grids: dict[str, Grid] = {
        name: quantize(linear.weight.detach(), 4).grid
        for index in range(len(model.model.layers))
        for name, linear in layer_linears(model, index)
    }
    weights = (model.model.embed_tokens.weight, model.lm_head.weight)
    rounded = tuple(quantize(w.detach(), 4).values(w.shape[1]) for w in weights)
    return Served(lambda subnet: float(sum(subnet.widths)), grids, {4: rounded} if outer else {})


def on_grid(told: Served, name: str, weight: Tensor) -> Tensor:
    assert told.grids is not None
    return told.grids[name].part(*weight.shape).rounded(weight.detach())


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def divergence(model: PreTrainedModel, ids: Tensor, wanted: Tensor) -> Tensor:
    found = final_states(model, ids)
    return distillation(found.flatten(0, 1), wanted.flatten(0, 1), model.lm_head.weight)


def test_active_matrices_are_rounded_within_the_block_alone(model: PreTrainedModel) -> None:
    elastic, before = Elastic(model), snapshot(model)
    told = served(model)
    active = elastic.activate(SUBNET)
    with pytest.raises(KeyboardInterrupt), told.weights(active, SUBNET):
        first, second, third = active.model.layers
        name = "model.layers.0.mlp.down_proj"
        assert torch.equal(first.mlp.down_proj.weight, on_grid(told, name, before[f"{name}.weight"][:, :32]))
        name = "model.layers.3.self_attn.q_proj"
        assert torch.equal(third.self_attn.q_proj.weight, on_grid(told, name, before[f"{name}.weight"]))
        assert torch.equal(second.mlp.up_proj.weight, before["model.layers.2.mlp.up_proj.weight"])
        beyond = before["model.layers.0.mlp.down_proj.weight"][:, 32:]
        assert torch.equal(first.mlp.down_proj.whole.weight[:, 32:], beyond)
        raise KeyboardInterrupt
    elastic.reset()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_gradients_are_those_of_the_rounded_weights(model: PreTrainedModel, ids: Tensor) -> None:
    subnet = SubNetwork((0, 1, 2, 3), (64,) * 4, (4,) * 4)
    told = served(model)
    with torch.no_grad():
        wanted = final_states(model, ids)
    with told.weights(Elastic(model).activate(subnet), subnet):
        divergence(model, ids, wanted).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        for index in range(4):
            for name, linear in layer_linears(model, index):
                linear.weight.copy_(on_grid(told, name, linear.weight))
    divergence(model, ids, wanted).backward()  # type: ignore[no-untyped-call]
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == own.keys()
    assert all(torch.allclose(found[name], grad) for name, grad in own.items())


def test_what_learns_rounded_agrees_better_rounded(model: PreTrainedModel) -> None:
    text = torch.randint(97, (16, 12), generator=torch.Generator().manual_seed(2))
    shape = shape_of_config(model.config)
    space = SearchSpace(shape, (4,), (64,), bits=(4,))
    told = served(model)
    with torch.no_grad():
        wanted = final_states(model, text)
        with told.weights(model, space.full):
            before = float(divergence(model, text, wanted))
    finetune(Elastic(model), space, text, FinetuneConfig(steps=60, batch=8, lr=2e-3), served=told)
    with torch.no_grad(), told.weights(model, space.full):
        assert float(divergence(model, text, wanted)) < 0.7 * before


def test_scales_learn_by_the_gradient_of_the_loss(model: PreTrainedModel, ids: Tensor) -> None:
    """Against differences: the loss at a scale a little larger and a little smaller."""
    subnet = SubNetwork((0, 1, 2, 3), (64,) * 4, (4,) * 4)
    told = served(model)
    told.learn_scales(Elastic(model).activate(subnet), subnet)
    with torch.no_grad():
        wanted = final_states(model, ids)
    with told.weights(model, subnet):
        divergence(model, ids, wanted).backward()  # type: ignore[no-untyped-call]
    name, linear = layer_linears(model, 1)[6]
    assert told.grids is not None and name.endswith("down_proj")
    integers, zeros = quantize(linear.weight.detach(), 4).unpacked(), quantize(linear.weight, 4).grid.zeros
    scales, row, losses = told.grids[name].scales, 3, []
    for factor in (1.01, 0.99):
        moved = scales.clone()
        moved[row, 1] *= factor
        with torch.no_grad(), told.weights(model, subnet):
            linear.weight.copy_(Grid(moved, zeros, 4).values(integers.clone(), 64))
            losses.append(float(divergence(model, ids, wanted)))
    slope = (losses[0] - losses[1]) / 0.02
    gradient = told.shifts[name].grad
    assert gradient is not None
    unrounded = linear.weight.detach()[row, 32:64]
    whole = linear.weight.grad[
        row, 32:64
    ]  # what the straight-through estimator takes off: weights keep still
    straight = float((whole * unrounded).sum())
    expected = SCALE_RATE * (slope - straight)
    assert float(gradient[row, 1]) == pytest.approx(expected, rel=0.1, abs=1e-4)


def test_embeddings_that_ship_rounded_are_learnt_with(model: PreTrainedModel, ids: Tensor) -> None:
    subnet = SubNetwork((0, 1, 2, 3), (64,) * 4, (8,) * 4, (4, 4))
    told, before = served(model, outer=True), snapshot(model)
    space = SearchSpace(shape_of_config(model.config), (4,), (64,), bits=(8,), outer_bits=(4,))
    with torch.no_grad():
        wanted = final_states(model, ids)
        with told.weights(model, subnet):
            assert torch.equal(model.model.embed_tokens.weight, told.outer[4][0])
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])

    def apart() -> float:
        with torch.no_grad(), told.weights(model, subnet):
            found = final_states(model, ids).flatten(0, 1)
            own, rounded = before["lm_head.weight"], model.lm_head.weight.detach()
            return float(distillation(found, wanted.flatten(0, 1), rounded, target_head=own))

    untuned = apart()
    finetune(Elastic(model), space, ids, FinetuneConfig(steps=40, batch=len(ids), lr=2e-3), served=told)
    assert apart() < 0.8 * untuned


def test_frozen_weights_do_not_learn_rounded(model: PreTrainedModel, space: SearchSpace, ids: Tensor) -> None:
    config = FinetuneConfig(steps=1, batch=1, lora_rank=4)
    with pytest.raises(InputError, match="without rounding"):
        finetune(Elastic(model), space, ids, config, served=served(model))


def test_the_budget_is_in_the_served_size(model: PreTrainedModel, space: SearchSpace, ids: Tensor) -> None:
    seen: list[int] = []

    def size(subnet: SubNetwork) -> float:
        seen.append(sum(subnet.widths))
        return float(seen[-1])

    config = FinetuneConfig(steps=2, batch=1, sampling="budget", budget=128, super_every=0)
    finetune(Elastic(model), space, ids, config, served=Served(size))
    assert sum(space.smallest.widths) in seen and len(seen) > 32
