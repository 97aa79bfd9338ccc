"""Extracted sub-networks stand alone: same logits, exact sizes, loadable by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor import models
from compressor.space import SubNetwork, parameter_count
from compressor.supernet.elastic import Elastic
from compressor.supernet.extraction import extract, save_subnetwork

from .conftest import FAMILIES, make_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIXED = SubNetwork((0, 2, 3), (16, 64, 48))
UNIFORM = SubNetwork((0, 3), (32, 32))


@pytest.mark.parametrize("subnet", [MIXED, UNIFORM])
@torch.no_grad()
def test_an_extract_computes_what_the_active_one_does(
    family_model: PreTrainedModel, ids: Tensor, subnet: SubNetwork
) -> None:
    extracted = extract(family_model, subnet)
    active = Elastic(family_model).activate(subnet)
    assert torch.allclose(extracted(ids).logits, active(ids).logits, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(FAMILIES)))
def test_sizes_are_exact(data: st.DataObject, name: str) -> None:
    model = make_model(name)
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, 3), min_size=1))))
    widths = tuple(data.draw(st.integers(1, 64)) for _ in layers)
    subnet = SubNetwork(layers, widths)
    shape = models.shape_of_config(model.config)
    extracted = extract(model, subnet)
    assert sum(p.numel() for p in extracted.parameters()) == parameter_count(shape, subnet)


def test_an_extract_shares_nothing_with_its_origin(model: PreTrainedModel) -> None:
    extracted = extract(model, SubNetwork((0, 1, 2, 3), (64,) * 4))
    origins = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in origins for p in extracted.parameters())


def test_an_active_sub_network_must_be_reset_first(model: PreTrainedModel) -> None:
    Elastic(model).activate(UNIFORM)
    with pytest.raises(ValueError, match="reset"):
        extract(model, MIXED)


@pytest.mark.parametrize("subnet", [MIXED, UNIFORM])
@torch.no_grad()
def test_a_saved_sub_network_loads_with_identical_logits(
    family_model: PreTrainedModel, ids: Tensor, subnet: SubNetwork, tiny: models.LoadedModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_subnetwork(family_model, subnet, tiny.tokenizer, tmp_path / "sub")
    custom = subnet == MIXED
    assert (folder / "modeling_elastic.py").is_file() == custom
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=custom)
    assert torch.equal(loaded(ids).logits, extract(family_model, subnet)(ids).logits)
