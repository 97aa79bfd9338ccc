"""The optimizer keeps what bf16 would lose, and its schedule warms up and comes down."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from compressor.supernet.optimizer import MasterAdamW, warmup_cosine


def make(parameter: Parameter, decay: float = 0.0) -> MasterAdamW:
    return MasterAdamW([parameter], lr=1e-4, weight_decay=decay, betas=(0.9, 0.95))


def test_small_steps_add_up_in_bf16() -> None:
    parameter = Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = make(parameter)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(lr=1e-4, max_norm=10.0)
    assert torch.allclose(parameter.float(), torch.full((4,), 0.99), atol=0.005)


def test_gradients_are_clipped_and_a_broken_one_changes_nothing() -> None:
    parameter = Parameter(torch.zeros(4))
    optimizer = make(parameter)
    parameter.grad = torch.full((4,), 100.0)
    assert optimizer.step(lr=1e-4, max_norm=1.0) == pytest.approx(200.0)
    before = parameter.detach().clone()
    parameter.grad = torch.tensor([math.nan, 1, 1, 1])
    assert math.isnan(optimizer.step(lr=1e-4, max_norm=1.0))
    assert torch.equal(parameter, before)


def test_a_restored_optimizer_goes_on_as_if_never_stopped() -> None:
    gradients = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def run(optimizer: MasterAdamW, parameter: Parameter, steps: range) -> None:
        for step in steps:
            parameter.grad = gradients[step].to(parameter.dtype)
            optimizer.step(lr=1e-2, max_norm=1.0)

    straight = Parameter(torch.zeros(4, dtype=torch.bfloat16))
    run(make(straight), straight, range(6))
    first, second = (Parameter(torch.zeros(4, dtype=torch.bfloat16)) for _ in range(2))
    halfway, resumed = make(first), make(second)
    run(halfway, first, range(3))
    resumed.load_state_dict(halfway.state_dict())
    assert torch.equal(second, first)
    run(resumed, second, range(3, 6))
    assert torch.equal(second, straight)


def test_norms_do_not_decay() -> None:
    matrix, vector = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))
    optimizer = MasterAdamW([matrix, vector], lr=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step(lr=0.1, max_norm=1.0)
    assert (matrix < 1).all()
    assert (vector == 1).all()


def test_the_schedule_rises_and_falls() -> None:
    factors = [warmup_cosine(i / 100, warmup=0.1) for i in range(101)]
    assert factors[0] == pytest.approx(0.05)
    assert max(factors) == pytest.approx(1.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.05)
