"""Sub-networks are switched on in place: views, right gradients, right caches, all of it undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from compressor.space import SubNetwork
from compressor.supernet.elastic import Elastic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART = SubNetwork((0, 2, 3), (16, 64, 48))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    result: Tensor = model(ids, use_cache=False).logits
    return result


def test_reset_restores_the_super_network(family_model: PreTrainedModel, ids: Tensor) -> None:
    before, config = logits(family_model, ids), family_model.config.to_dict()
    state = {name: tensor.clone() for name, tensor in family_model.state_dict().items()}
    elastic = Elastic(family_model)
    assert not torch.equal(logits(elastic.activate(PART), ids), before)
    elastic.reset()
    assert torch.equal(logits(family_model, ids), before)
    assert family_model.config.to_dict() == config
    assert all(torch.equal(state[name], tensor) for name, tensor in family_model.state_dict().items())


def test_weights_are_shared_not_copied(model: PreTrainedModel) -> None:
    whole = model.model.layers[2].mlp.gate_proj.weight
    part = Elastic(model).activate(SubNetwork((2,), (16,))).model.layers[0].mlp.gate_proj.weight
    assert part.shape == (16, 32)
    assert part.data_ptr() == whole.data_ptr()


def test_gradients_land_in_the_kept_part_alone(model: PreTrainedModel, ids: Tensor) -> None:
    whole = [layer.mlp.down_proj.weight for layer in model.model.layers]
    model_loss = Elastic(model).activate(PART)(ids, labels=ids, use_cache=False).loss
    model_loss.backward()
    gradient = whole[0].grad
    assert gradient is not None
    assert gradient[:, :16].abs().sum() > 0
    assert gradient[:, 16:].abs().sum() == 0
    assert whole[1].grad is None


def test_generating_with_a_cache_equals_generating_without(
    family_model: PreTrainedModel, ids: Tensor
) -> None:
    model = Elastic(family_model).activate(PART)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options)
    )


def test_the_block_restores_what_was_active_even_after_an_error(model: PreTrainedModel, ids: Tensor) -> None:
    elastic = Elastic(model)
    expected = logits(elastic.activate(PART), ids)
    with pytest.raises(RuntimeError), elastic.activated(SubNetwork((1,), (64,))):
        raise RuntimeError
    assert elastic.active == PART
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("wrong", [SubNetwork((4,), (16,)), SubNetwork((0,), (65,)), SubNetwork((), ())])
def test_a_sub_network_of_another_model_is_refused(model: PreTrainedModel, wrong: SubNetwork) -> None:
    with pytest.raises(ValueError, match=r"layers|widths"):
        Elastic(model).activate(wrong)
