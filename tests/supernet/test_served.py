"""Tuning sees sub-networks as they are served: rounded to their bits, and of their size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from compressor.engines.rounding import rounded
from compressor.errors import InputError
from compressor.models import shape_of_config
from compressor.space import SearchSpace, SubNetwork
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, finetune
from compressor.supernet.losses import distillation
from compressor.supernet.served import Served
from compressor.supernet.targets import final_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SERVED = Served(lambda subnet: float(sum(subnet.widths)), rounded)
SUBNET = SubNetwork((0, 2, 3), (32, 64, 32), (4, 8, 4))


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def divergence(model: PreTrainedModel, ids: Tensor, wanted: Tensor) -> Tensor:
    found = final_states(model, ids)
    return distillation(found.flatten(0, 1), wanted.flatten(0, 1), model.lm_head.weight)


def test_active_matrices_are_rounded_within_the_block_alone(model: PreTrainedModel) -> None:
    elastic, before = Elastic(model), snapshot(model)
    active = elastic.activate(SUBNET)
    with pytest.raises(KeyboardInterrupt), SERVED.weights(active, SUBNET):
        first, second, third = active.model.layers
        own = before["model.layers.0.mlp.down_proj.weight"][:, :32]
        assert torch.equal(first.mlp.down_proj.weight, rounded(own, 4))
        assert torch.equal(third.self_attn.q_proj.weight, rounded(third.self_attn.q_proj.weight.detach(), 4))
        assert torch.equal(second.mlp.up_proj.weight, before["model.layers.2.mlp.up_proj.weight"])
        beyond = before["model.layers.0.mlp.down_proj.weight"][:, 32:]
        assert torch.equal(first.mlp.down_proj.whole.weight[:, 32:], beyond)
        raise KeyboardInterrupt
    elastic.reset()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_gradients_are_those_of_the_rounded_weights(model: PreTrainedModel, ids: Tensor) -> None:
    subnet = SubNetwork((0, 1, 2, 3), (64,) * 4, (4,) * 4)
    with torch.no_grad():
        wanted = final_states(model, ids)
    with SERVED.weights(Elastic(model).activate(subnet), subnet):
        divergence(model, ids, wanted).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
                linear.weight.copy_(rounded(linear.weight, 4))
    divergence(model, ids, wanted).backward()  # type: ignore[no-untyped-call]
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == own.keys()
    assert all(torch.allclose(found[name], grad) for name, grad in own.items())


def test_what_learns_rounded_agrees_better_rounded(model: PreTrainedModel) -> None:
    text = torch.randint(97, (16, 12), generator=torch.Generator().manual_seed(2))
    shape = shape_of_config(model.config)
    space = SearchSpace(shape, (4,), (64,), bits=(4,))
    with torch.no_grad():
        wanted = final_states(model, text)
        with SERVED.weights(model, space.full):
            before = float(divergence(model, text, wanted))
    finetune(Elastic(model), space, text, FinetuneConfig(steps=60, batch=8, lr=2e-3), served=SERVED)
    with torch.no_grad(), SERVED.weights(model, space.full):
        assert float(divergence(model, text, wanted)) < 0.7 * before


def test_frozen_weights_do_not_learn_rounded(model: PreTrainedModel, space: SearchSpace, ids: Tensor) -> None:
    config = FinetuneConfig(steps=1, batch=1, lora_rank=4)
    with pytest.raises(InputError, match="without rounding"):
        finetune(Elastic(model), space, ids, config, served=SERVED)


def test_the_budget_is_in_the_served_size(model: PreTrainedModel, space: SearchSpace, ids: Tensor) -> None:
    seen: list[int] = []

    def size(subnet: SubNetwork) -> float:
        seen.append(sum(subnet.widths))
        return float(seen[-1])

    config = FinetuneConfig(steps=2, batch=1, sampling="budget", budget=128, super_every=0)
    finetune(Elastic(model), space, ids, config, served=Served(size))
    assert sum(space.smallest.widths) in seen and len(seen) > 32
