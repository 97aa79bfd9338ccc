"""Chunked losses equal the plain ones, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.supernet import losses
from compressor.supernet.losses import IGNORED, cross_entropy, distillation


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "ROWS_AT_ONCE", 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence(temperature: float) -> None:
    hidden, target, head = random(10, 8).requires_grad_(), random(10, 8, seed=1), random(31, 8, seed=2)
    teacher = F.log_softmax(target @ head.T / temperature, -1)
    student = F.log_softmax(hidden @ head.T / temperature, -1)
    plain = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    (wanted,) = torch.autograd.grad(plain, hidden)
    loss = distillation(hidden, target, head, temperature)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.allclose(loss, plain, atol=1e-5)
    assert torch.allclose(gradient, wanted, atol=1e-5)


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    hidden, head = random(10, 8).requires_grad_(), random(31, 8, seed=2)
    loss = distillation(hidden, hidden.detach(), head)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(float(loss.detach())) < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("head_learns", [False, True])
def test_cross_entropy_leaves_ignored_labels_out(head_learns: bool) -> None:
    hidden, head = random(10, 8).requires_grad_(), random(31, 8, seed=2).requires_grad_(head_learns)
    labels = torch.tensor([3, IGNORED, 5, 30, IGNORED, 0, 7, 7, 1, IGNORED])
    plain = F.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORED)
    learners = (hidden, head) if head_learns else (hidden,)
    wanted = torch.autograd.grad(plain, learners)
    loss = cross_entropy(hidden, labels, head)
    gradients = torch.autograd.grad(2 * loss, learners)
    assert torch.allclose(loss, plain, atol=1e-5)
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, 2 * expected, atol=1e-5)


def test_a_head_learns_from_states_that_do_not() -> None:
    hidden, head, labels = random(10, 8), random(31, 8, seed=2).requires_grad_(), torch.arange(10)
    (wanted,) = torch.autograd.grad(F.cross_entropy(hidden @ head.T, labels), head)
    (gradient,) = torch.autograd.grad(cross_entropy(hidden, labels, head), head)
    assert torch.allclose(gradient, wanted, atol=1e-5)


def test_a_loss_alone_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> Tensor:
        raise AssertionError("a gradient was computed")

    hidden, head, labels = random(10, 8).requires_grad_(), random(31, 8, seed=2), torch.arange(10)
    monkeypatch.setattr(Tensor, "scatter_add_", none)
    with torch.no_grad():
        loss = cross_entropy(hidden, labels, head)
    assert torch.allclose(loss, F.cross_entropy(hidden @ head.T, labels), atol=1e-5)
