"""Scoring in PyTorch with the weights that a package will hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.engines.rounding import RoundedWeights
from compressor.space import SubNetwork
from compressor.supernet.elastic import Elastic
from tests.conftest import make_tiny_model
from tests.engines.reference import cut_quantized, logits

IDS = np.arange(40, 80, dtype=np.int64)[None]
SUBNETS = (
    SubNetwork((0, 2, 3), (64, 128, 64), (4, 8, 8)),
    SubNetwork((0, 1, 2, 3), (128,) * 4, (8, 4, 8, 4)),
    SubNetwork((1, 2), (64, 64), (4, 4)),
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("outer", [(8, 8), (4, 4), (8, 4)])
def test_a_sub_network_computes_as_one_that_was_cut_and_quantized(
    tmp_path: Path, tied: bool, outer: tuple[int, int]
):
    if tied and outer[0] != outer[1]:
        pytest.skip("tied embeddings have one number of bits")
    folder = make_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rounded, elastic = RoundedWeights(model, (4, 8), (4, 8)), Elastic(model)
    for subnet in (replace(subnet, outer=outer) for subnet in (*SUBNETS, SUBNETS[0])):
        rounded.choose(subnet)
        with elastic.activated(subnet) as active:
            found = logits(active, IDS)
        np.testing.assert_allclose(found, logits(cut_quantized(folder, subnet), IDS), atol=1e-5)


def test_four_bits_alone_keep_one_copy(tiny_model_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    rounded = RoundedWeights(model, (4,), (4,))
    with pytest.raises(KeyError):
        rounded.choose(SubNetwork((0,), (64,), (8,)))
