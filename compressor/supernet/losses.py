"""Losses of the output distribution, computed and differentiated a few rows of logits at a time.

A vocabulary of 50,000 makes the logits of a batch larger than all its activations. Here the gradient
with respect to the final hidden states is found in the forward pass and only it is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 256
IGNORED = -100
"""A label that does not count."""


def distillation(
    hidden: Tensor,
    target: Tensor,
    head: Tensor,
    temperature: float = 1.0,
    target_head: Tensor | None = None,
) -> Tensor:
    """Mean KL divergence (nats a token) of the student's next-token distribution from the teacher's.

    ``hidden`` and ``target`` (tokens, hidden_size) are both models' states before the head, ``head``
    (vocabulary, hidden_size) is shared unless the teacher has ``target_head``, and receives no gradient.
    Scaled by temperature² (Hinton et al., arXiv 1503.02531).
    """
    reads = head if target_head is None else target_head
    loss: Tensor = _Distillation.apply(hidden, target, head, reads, temperature)  # type: ignore[no-untyped-call]
    return loss


def cross_entropy(hidden: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats a token) of ``labels`` (tokens,), ``IGNORED`` ones left out.

    The head receives its gradient only if it requires one.
    """
    if not torch.is_grad_enabled():
        hidden, head = hidden.detach(), head.detach()
    loss: Tensor = _CrossEntropy.apply(hidden, labels, head)  # type: ignore[no-untyped-call]
    return loss


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, head: Tensor, target_head: Tensor, temperature: float
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            wanted = F.linear(target[rows], target_head).float().div_(temperature).log_softmax(-1)
            found = F.linear(hidden[rows], head).float().div_(temperature).log_softmax(-1)
            chances = wanted.exp()
            total += (chances * (wanted - found)).sum()
            slope = found.exp_().sub_(chances).to(head.dtype)
            gradient[rows] = slope @ head
        scale = 1.0 / len(hidden)
        ctx.save_for_backward(gradient.mul_(scale * temperature))
        return total * (scale * temperature**2)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Tensor) -> Tensor:
        of_hidden, _, of_head = ctx.needs_input_grad
        gradient = torch.zeros_like(hidden) if of_hidden else None
        head_gradient = torch.zeros_like(head, dtype=torch.float32) if of_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        counted = (labels != IGNORED).nonzero()[:, 0]
        scale = 1.0 / max(len(counted), 1)
        for rows in torch.split(counted, ROWS_AT_ONCE):
            found = F.linear(hidden[rows], head).float().log_softmax(-1)
            total -= found.gather(1, labels[rows, None]).sum()
            if gradient is None and head_gradient is None:
                continue
            slope = found.exp_()
            slope.scatter_add_(1, labels[rows, None], -torch.ones_like(slope[:, :1]))
            slope.mul_(scale)
            if head_gradient is not None:
                head_gradient.addmm_(slope.t(), hidden[rows].float())
            if gradient is not None:
                gradient[rows] = slope.to(head.dtype) @ head
        ctx.save_for_backward(gradient, head_gradient)
        ctx.head_dtype = head.dtype
        return total * scale

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        gradient, head_gradient = ctx.saved_tensors
        if gradient is not None:
            gradient = gradient * outer[0].to(gradient.dtype)
        if head_gradient is not None:
            head_gradient = (head_gradient * outer[0]).to(ctx.head_dtype)
        return gradient, None, head_gradient
