"""The kernels for a CPU's matrix unit give what fp32 arithmetic gives, at any size they say they suit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compressor.evaluation import attention, products, tiles
from compressor.evaluation.kernels import Workspace
from compressor.evaluation.products import Means
from compressor.evaluation.schedule import Call, Rows
from compressor.evaluation.scorer import PackedLM
from tests.evaluation.test_kernels import numbers
from tests.evaluation.test_scorer import make_requests, values_of

pytestmark = pytest.mark.skipif(not tiles.usable(), reason="this CPU has no matrix unit (Intel AMX)")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def multiplied(states: Tensor, weight: Tensor) -> Tensor:
    return states.float() @ weight.float().t()


@pytest.mark.parametrize("shape", [(1, 32, 32), (32, 64, 64), (33, 96, 576), (70, 192, 1536), (5, 1504, 96)])
def test_a_product_of_any_number_of_rows_with_and_without_a_residual(shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    states, weight, residual = numbers(rows, depth), numbers(columns, depth), numbers(rows, columns, spread=9)
    assert products.suit(weight)
    for added in (None, residual):
        out = torch.full((rows, columns), torch.nan).bfloat16()
        found = products.product(states, weight, added, out, Workspace())
        exact = multiplied(states, weight) + (0 if added is None else residual.float())
        assert found is out
        torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=2e-4)


def test_slices_of_wider_weights_are_read_in_place() -> None:
    states, wide = numbers(40, 64), numbers(128, 96)
    weight = wide[:96, :64]
    found = products.product(states, weight, None, torch.empty(40, 96).bfloat16(), Workspace())
    torch.testing.assert_close(found.float(), multiplied(states, weight), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("width", [32, 96, 1504])
def test_gated_products(width: int) -> None:
    states, gate, up = numbers(45, 64), numbers(width, 64), numbers(width, 64)
    states[0], states[1] = 0, 300
    exact = F.silu(multiplied(states, gate)) * multiplied(states, up)
    found = products.gated_product(states, gate, up, torch.empty(45, width).bfloat16(), Workspace())
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=2e-4)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 32), (33, 1005), (64, 7), (40, 4000)])
def test_scores_of_the_vocabulary(rows: int, vocabulary: int) -> None:
    states, weight = numbers(rows, 128), numbers(vocabulary, 128)
    states[0] *= 30
    counts = torch.randint(0, 4, (rows,))
    starts = np.concatenate([[0], np.cumsum(counts.numpy())])
    targets = torch.randint(vocabulary, (int(starts[-1]),)).numpy()
    chosen, largest, normaliser = products.vocabulary_scores(states, weight, starts, targets, Workspace())
    logits = multiplied(states, weight)
    places = torch.repeat_interleave(torch.arange(rows), counts)
    for found, exact in (
        (chosen, logits[places, targets]),
        (largest, logits.amax(-1)),
        (normaliser, logits.logsumexp(-1)),
    ):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-3)
    top = logits.argmax(-1).numpy()
    again, most, _ = products.vocabulary_scores(states, weight, np.arange(rows + 1), top, Workspace())
    assert torch.equal(again, most)


def test_no_number_stays_no_number() -> None:
    states, weight = numbers(3, 32), numbers(64, 32)
    states[1, 5] = torch.nan
    starts, targets = np.arange(4), np.zeros(3, np.int64)
    _, _, normaliser = products.vocabulary_scores(states, weight, starts, targets, Workspace())
    assert normaliser.isnan().tolist() == [False, True, False]


def test_what_does_not_suit() -> None:
    assert not products.suit(numbers(32, 32).float())
    assert not products.suit(numbers(40, 32)) and products.suit_vocabulary(numbers(40, 32))
    assert not products.suit_vocabulary(numbers(32, 40))
    assert not products.suit_vocabulary(numbers(32, 32 + products._MOST_DEPTH))
    assert not products.suit_vocabulary(numbers(64, 32).t())
    assert attention.suit([call_of([9], 0, 0, False)], 64) and not attention.suit([], 96)
    assert not attention.suit([call_of([2 + attention._MOST_TOKENS], 0, 0, False)], 64)
    assert Means.of(numbers(2), 1) == Means(fused=True, tiled=True)
    assert Means.of(numbers(2), 2) == Means(fused=True, tiled=False)
    assert Means.of(numbers(2).float(), 1) == Means.of(numbers(2), 3) == Means(fused=False, tiled=False)


def rows_of(chosen: list[list[int]], sizes: list[int], start: int) -> Rows:
    """Of trees of these sizes, from row ``start`` on, the tokens chosen of each, as a padded batch."""
    length = max(map(len, chosen))
    gather = torch.full((len(sizes), length), start)
    offsets, valid = torch.zeros(len(sizes), length, dtype=torch.long), []
    for tree, own in enumerate(chosen):
        gather[tree, : len(own)] = start + sum(sizes[:tree]) + torch.tensor(own, dtype=torch.long)
        offsets[tree, : len(own)] = torch.tensor(own, dtype=torch.long)
        valid += [tree * length + i for i in range(len(own))]
    counts = torch.tensor(list(map(len, chosen)))
    return Rows(len(sizes), length, gather.flatten(), torch.tensor(valid), offsets, counts)


def call_of(sizes: list[int], start: int, before: int, some: bool) -> Call:
    """A call of random trees: each token but the first hangs from one before it."""
    everything = [list(range(size)) for size in sizes]
    ends = torch.full((len(sizes), max(sizes)), -1)
    for tree, size in enumerate(sizes):
        ends[tree, :size] = torch.arange(size)
        parents = [-1]
        for token in range(1, size):  # in depth-first order: from the last one or an ancestor of it
            parents.append(token - 1 if torch.rand(()) < 0.7 else parents[token - 1])
            above = parents[token]
            while above >= 0:
                ends[tree, above] = token
                above = parents[above]
    full = rows_of(everything, sizes, start)
    chosen = [own[size // 2 :] if size > 3 else [] for own, size in zip(everything, sizes, strict=True)]
    scored = rows_of(chosen, sizes, start) if some else None
    longest = before + max(sizes)
    return Call(-1 if not before else 0, start, start + sum(sizes), before, longest, ends, full, full, scored)


@pytest.mark.parametrize("before", [0, 5, 32, 70])
@pytest.mark.parametrize("heads", [(6, 2, 64), (4, 4, 128), (3, 1, 64)])
def test_attention_of_trees(before: int, heads: tuple[int, int, int]) -> None:
    many, groups, dim = heads
    calls = [call_of([3, 27, 1, 40], 0, before, True), call_of([70], 71, before, True)]
    query = numbers(141, many, dim)
    key, value = numbers(141, groups, dim), numbers(141, groups, dim)
    angles = torch.randn(141, 1, dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    past = (numbers(groups, before, dim), numbers(groups, before, dim)) if before else None
    turned_query, turned_key = (turned(t, cos, sin) for t in (query, key))
    for queries in ([call.full for call in calls], [call.scored for call in calls]):
        exact = torch.cat(
            [
                dense(call, rows, (turned_query * 0.1, turned_key, value.float()), past)
                for call, rows in zip(calls, queries, strict=True)
                if rows
            ]
        )
        pasts = [past, past]
        memory = Workspace()
        for state in ("attention panels", "attention blocks", "attention weights"):
            memory.take(state, 999, 999, query).fill_(torch.nan)  # nothing left behind may be met
        found = attention.attend(calls, queries, (query, key, value), (cos, sin), 0.1, pasts, memory)
        torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)
        states = ((turned_query * 0.1).bfloat16(), turned_key.bfloat16(), value)
        plain = attention.attend(calls, queries, states, None, 1.0, pasts, Workspace())
        torch.testing.assert_close(plain.float(), exact, rtol=0.02, atol=0.02)


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    states, half = states.float(), states.shape[-1] // 2
    return states * cos.float() + torch.cat([-states[..., half:], states[..., :half]], -1) * sin.float()


def dense(
    call: Call, rows: Rows, states: tuple[Tensor, Tensor, Tensor], past: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention in fp32 by torch, on padded batches under the call's own mask."""
    query, key, value = states
    q = query[rows.gather].view(rows.batch, rows.length, *query.shape[1:]).transpose(1, 2)
    full = call.full
    k, v = (t[full.gather].view(full.batch, full.length, *t.shape[1:]).transpose(1, 2) for t in (key, value))
    if past:
        k, v = (
            torch.cat([p.float().expand(full.batch, -1, -1, -1), t], 2)
            for p, t in zip(past, (k, v), strict=True)
        )
    mask = call.mask(rows, torch.float32)[:, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(0, 1).flatten(1)[rows.valid]


@pytest.mark.parametrize("biased", [False, True])
def test_a_model_is_scored_as_by_fp32(
    biased: bool, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, requests = AutoTokenizer.from_pretrained(tiny_model_folder), make_requests(40)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, attention_bias=biased, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    exact = values_of(PackedLM(model, tokenizer).loglikelihood(requests))
    tiled = values_of(PackedLM(model.bfloat16(), tokenizer).loglikelihood(requests))
    monkeypatch.setattr(attention, "_MOST_TOKENS", 16)
    long = values_of(PackedLM(model, tokenizer).loglikelihood(requests))
    monkeypatch.setattr(tiles, "usable", lambda: False)
    torchs = values_of(PackedLM(model, tokenizer).loglikelihood(requests))
    assert not np.array_equal(tiled, torchs) and not np.array_equal(tiled, long)
    assert np.abs(long - exact).max() < 1.5 * np.abs(torchs - exact).max()
    assert np.abs(tiled - exact).max() < 1.5 * np.abs(torchs - exact).max() < 0.05 * np.abs(exact).max()
