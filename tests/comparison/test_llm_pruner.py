"""LLM-Pruner removes whole groups and neurons, those of the least effect, down to a size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from compressor.comparison.llm_pruner import middle_layers, prune
from compressor.errors import InputError
from tests.comparison.conftest import logits
from tests.supernet.conftest import FAMILIES, make_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def mute(model: PreTrainedModel, group: int, neurons: list[int]) -> None:
    """Let a key-value head with its query heads, and these neurons, have no effect."""
    layer: Any
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        size = attention.o_proj.in_features // 2
        attention.o_proj.weight[:, group * size : (group + 1) * size] = 0
        attention.v_proj.weight[group * size // 2 : (group + 1) * size // 2] = 0
        mlp.down_proj.weight[:, neurons] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_no_effect_goes_first_and_nothing_changes(family: str, batches: list[Tensor]) -> None:
    model = make_model(family)
    mute(model, 1, list(range(5, 21)))
    expected, full = logits(model, batches[0]), model.num_parameters()
    layer: Any = model.model.layers[0]
    inner = sum(p.numel() for p in layer.parameters() if p.dim() > 1) * 4
    prune(model, batches, int(full - 0.25 * inner))
    widths = {layer.mlp.gate_proj.out_features for layer in model.model.layers}
    heads = {layer.self_attn.k_proj.out_features // layer.self_attn.head_dim for layer in model.model.layers}
    assert heads == {1} and min(widths) >= 48
    torch.testing.assert_close(logits(model, batches[0]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6])
def test_the_size_is_met_to_within_a_neuron_a_layer(share: float, batches: list[Tensor]) -> None:
    model = make_model()
    wanted = int(share * model.num_parameters())
    prune(model, batches, wanted)
    assert wanted - 4 * 3 * 32 < model.num_parameters() <= wanted
    with torch.no_grad():
        text = model.generate(batches[0][:1, :4], max_new_tokens=8, do_sample=False)
    assert text.shape == (1, 12)


def test_the_first_and_the_last_layers_stay_whole() -> None:
    assert middle_layers(32) == range(4, 30)
    assert middle_layers(30) == range(4, 28)


def test_a_size_that_the_layers_do_not_hold_is_refused(batches: list[Tensor]) -> None:
    with pytest.raises(InputError, match="LLM-Pruner cannot reach"):
        prune(make_model(), batches, 100)
