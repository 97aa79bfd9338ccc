"""Our bf16 kernels give what fp32 arithmetic gives, rounded once, at any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.evaluation import kernels
from compressor.evaluation.scorer import PackedLM
from tests.evaluation.test_scorer import make_requests, values_of

ULP = 2.0**-7
"""Of bf16, relative: a result rounded once is off by half of it at most."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def numbers(*shape: int, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * spread).bfloat16()


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found.float(), exact, rtol=0.51 * ULP, atol=1e-30)


@pytest.mark.parametrize("hidden", [1, 7, 64, 576])
def test_rms_norm(hidden: int) -> None:
    states, weight = numbers(5, hidden, spread=30), numbers(hidden)
    exact = states.float()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    assert_rounded_once(kernels.rms_norm(states, weight, 1e-5), exact)


@pytest.mark.parametrize("width", [1, 31, 96])
def test_gated_for_gates_of_any_size(width: int) -> None:
    gate, up = numbers(9, width, spread=4), numbers(9, width)
    gate[0], gate[1], gate[2] = 0, -300, 300
    exact = F.silu(gate.float()) * up.float()
    found = kernels.gated(gate, up, torch.empty_like(gate))
    torch.testing.assert_close(found.float(), exact, rtol=0.51 * ULP, atol=1e-30)


@pytest.mark.parametrize("prefix", [0, 3])
def test_heads_are_gathered_rotated_and_put_behind_a_prefix(prefix: int) -> None:
    states = numbers(11, 3, 16)
    angles = torch.randn(11, 1, 8).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    rows = torch.randint(11, (4 * 5,))
    before = numbers(3, prefix, 16) if prefix else None
    halves = torch.cat([-states[..., 8:], states[..., :8]], -1)
    rotated = (states.float() * cos.float() + halves.float() * sin.float()) * 0.3
    found = kernels.rotated_by_head(states, rows, 5, cos, sin, 0.3, before)
    plain = kernels.by_head(states, rows, 5, before)
    assert found.shape == plain.shape == (4, 3, prefix + 5, 16)
    picked = [t[rows].view(4, 5, 3, 16).transpose(1, 2) for t in (rotated, states)]
    torch.testing.assert_close(found[:, :, prefix:].float(), picked[0], rtol=0.51 * ULP, atol=1e-6)
    torch.testing.assert_close(plain[:, :, prefix:], picked[1])
    if before is not None:
        for behind in (found, plain):
            torch.testing.assert_close(behind[:, :, :prefix], before.expand(4, -1, -1, -1))


@pytest.mark.parametrize("keys", [1, 13, 64])
def test_softmax_over_the_keys_that_are_not_hidden(keys: int) -> None:
    scores = numbers(2, 3, 4, keys, spread=5)
    hidden = torch.rand(2, 4, keys) < 0.4
    hidden[..., 0] = False
    mask = torch.zeros(2, 4, keys).masked_fill(hidden, torch.finfo(torch.bfloat16).min).bfloat16()
    exact = scores.float().masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    found = kernels.masked_softmax(scores, mask)
    torch.testing.assert_close(found.float(), exact, rtol=0.51 * ULP, atol=1e-7)
    assert not found[hidden[:, None].expand_as(found)].any()


def test_the_largest_logit_and_the_normaliser() -> None:
    logits = numbers(6, 1000, spread=10)
    logits[0], logits[1, 500] = -400, 300
    largest, total = kernels.largest_and_total(logits)
    assert torch.equal(largest, logits.float().amax(-1))
    torch.testing.assert_close(total.log() + largest, logits.float().logsumexp(-1), rtol=1e-6, atol=1e-5)


def test_memory_is_used_again_and_grows() -> None:
    memory, like = kernels.Workspace(), numbers(1)
    first = memory.take("a", 2, 3, like)
    assert first.shape == (2, 3) and first.dtype == like.dtype
    assert memory.take("a", 3, 2, like).data_ptr() == first.data_ptr()
    assert memory.take("b", 2, 3, like).data_ptr() != first.data_ptr()
    assert memory.take("a", 50, 60, like).shape == (50, 60)


def test_a_broken_model_scores_no_number(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    lm = PackedLM(model, AutoTokenizer.from_pretrained(tiny_model_folder))
    assert np.isnan(values_of(lm.loglikelihood(make_requests(6)))).all()


@pytest.mark.parametrize("threads", [1, 16])
def test_with_many_threads_torchs_own_kernels_give_the_same(tiny_model_folder: Path, threads: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    tokenizer, requests = AutoTokenizer.from_pretrained(tiny_model_folder), make_requests(24)
    exact = values_of(PackedLM(model, tokenizer).loglikelihood(requests))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = values_of(PackedLM(model.bfloat16(), tokenizer).loglikelihood(requests))
    finally:
        torch.set_num_threads(before)
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
