"""The preflight's figures: what tuning takes, for all weights and for adapters."""

from __future__ import annotations

import pytest

from compressor.errors import InputError
from compressor.pipeline.plan import tuning_memory_bytes
from compressor.request import RunRequest, fresh
from compressor.space import ModelShape

LLAMA2_7B = ModelShape(
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
)


def ask(**flags: object) -> RunRequest:
    return fresh({"profile": "starter-cpu", "preset": "standard", **flags})


def test_adapters_of_a_7b_model_fit_40_gb_where_its_weights_do_not() -> None:
    full = tuning_memory_bytes(ask(profile="a100-40g"), LLAMA2_7B)
    assert full == 6_738_415_616 * 18
    assert tuning_memory_bytes(ask(), LLAMA2_7B) == 6_738_415_616 * 22, (
        "unrounded weights beside rounded ones"
    )
    assert 27e9 < tuning_memory_bytes(ask(lora_rank=16), LLAMA2_7B) < 40e9


def test_adapters_count_their_rank_and_what_is_kept_of_each_token() -> None:
    small, large = (tuning_memory_bytes(ask(lora_rank=rank), LLAMA2_7B) for rank in (8, 16))
    assert large - small == 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)) * 18
    with_data = tuning_memory_bytes(ask(lora_rank=16, train_data="rows.jsonl"), LLAMA2_7B)
    assert large - with_data == 2048 * 256 * 4096 * 4


def test_a_rank_that_spares_nothing_is_refused_before_anything_loads() -> None:
    with pytest.raises(InputError, match="lower --lora-rank"):
        tuning_memory_bytes(ask(lora_rank=4096), LLAMA2_7B)
