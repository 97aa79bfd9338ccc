"""SliceGPT turns states to their principal axes, which changes nothing, and cuts the least of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from compressor.comparison import slicegpt
from compressor.comparison.slicegpt import slice_model, sliced_parameters, sliced_width
from compressor.errors import InputError
from compressor.models import shape_of_config
from compressor.space import SearchSpace
from compressor.supernet.data import Examples
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, finetune
from compressor.supernet.targets import compute
from tests.comparison.conftest import logits
from tests.supernet.conftest import FAMILIES, make_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_axes_kept_the_model_computes_the_same(family: str, batches: list[Tensor]) -> None:
    model = make_model(family)
    expected = logits(model, batches[0])
    slice_model(model, batches, 10**9)
    torch.testing.assert_close(logits(model, batches[0]), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_the_size_is_met_by_the_width_that_was_counted(
    family: str, share: float, batches: list[Tensor]
) -> None:
    model = make_model(family)
    wanted = int(share * model.num_parameters())
    width = sliced_width(model, wanted)
    counted = sliced_parameters(model, width)
    slice_model(model, batches, wanted)
    assert model.num_parameters() == counted <= wanted
    assert model.model.embed_tokens.weight.shape == (97, width)
    with torch.no_grad():
        text = model.generate(batches[0][:1, :4], max_new_tokens=8, do_sample=False)
    assert text.shape == (1, 12)


def test_the_principal_axes_lose_less_than_any_others(
    batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    wanted = int(0.8 * model.num_parameters())
    expected = logits(model, batches[0]).log_softmax(-1)

    def lost(sliced: PreTrainedModel) -> float:
        found = logits(sliced, batches[0]).log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    ours = lost(slice_model(copy.deepcopy(model), batches, wanted))
    found = slicegpt._Slicing._axes

    def any_others(self: slicegpt._Slicing, states: list[Tensor]) -> Tensor:
        axes = found(self, states)
        turned: Tensor = torch.linalg.qr(torch.randn(axes.shape[0], axes.shape[0])).Q[:, : axes.shape[1]]
        return turned

    monkeypatch.setattr(slicegpt._Slicing, "_axes", any_others)
    torch.manual_seed(0)
    assert ours < lost(slice_model(copy.deepcopy(model), batches, wanted))


@pytest.mark.parametrize("rank", [0, 8])
def test_a_sliced_model_learns_from_the_whole_one_whose_head_is_another(
    rank: int, batches: list[Tensor]
) -> None:
    model = make_model("qwen2")
    ids = torch.cat(batches)
    config = FinetuneConfig(
        steps=12,
        batch=4,
        lr=1e-2 if rank else 3e-3,
        super_every=1,
        lora_rank=rank,
        gradient_checkpointing=rank > 0,
    )
    teacher = replace(compute(model, ids, 4), head=model.lm_head.weight.detach().clone())
    slice_model(model, batches, int(0.8 * model.num_parameters()))
    shape = shape_of_config(model.config)
    space = SearchSpace(shape, (shape.num_layers,), (shape.intermediate_size,))
    losses: list[float] = []
    finetune(
        Elastic(model),
        space,
        Examples.of_text(ids),
        config,
        on_curve=lambda _network, _step, loss: losses.append(loss),
        original=teacher,
    )
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_a_size_below_the_smallest_width_is_refused(batches: list[Tensor]) -> None:
    with pytest.raises(InputError, match="cannot reach"):
        slice_model(make_model(), batches, 10)
