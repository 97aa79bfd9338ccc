"""Adapters: elastic with the widths, alone in memory and checkpoints, and gone when the tuning ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import InputError, RunConflictError, TrainingError
from compressor.events import Event, LossReported
from compressor.space import SearchSpace, SubNetwork
from compressor.supernet import checkpoint, lora
from compressor.supernet.config import FinetuneConfig, adapter_parameters
from compressor.supernet.data import Examples
from compressor.supernet.elastic import ATTENTION_LINEARS, MLP_LINEARS, Elastic
from compressor.supernet.extraction import extract
from compressor.supernet.finetune import finetune
from compressor.supernet.trained import trained_parameters

from .conftest import make_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART = SubNetwork((0, 2, 3), (16, 64, 48))
CONFIG = FinetuneConfig(steps=6, batch=4, lr=1e-2, super_every=2, lora_rank=4)


@pytest.fixture
def text() -> Tensor:
    """Token ids (16, 12)."""
    return torch.randint(97, (16, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    result: Tensor = model(ids, use_cache=False).logits
    return result


def adapted(model: PreTrainedModel, rank: int = 4) -> Elastic:
    """The model with adapters that already add something."""
    elastic = Elastic(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.attach(elastic, rank, 2.0 * rank, seed=0):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return elastic


def test_fresh_adapters_change_nothing(family_model: PreTrainedModel, ids: Tensor) -> None:
    before = logits(family_model, ids)
    lora.attach(Elastic(family_model), 4, 8.0, seed=0)
    assert torch.equal(logits(family_model, ids), before)


@pytest.mark.parametrize("subnet", [None, PART])
def test_merged_weights_compute_what_the_adapters_did(
    family_model: PreTrainedModel, ids: Tensor, subnet: SubNetwork | None
) -> None:
    plain = logits(family_model, ids)
    names = list(family_model.state_dict())
    elastic = adapted(family_model)
    wanted = logits(elastic.activate(subnet) if subnet else elastic.reset(), ids)
    lora.merge(elastic)
    found = logits(elastic.activate(subnet) if subnet else family_model, ids)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(logits(elastic.reset(), ids), plain, atol=1e-2)
    assert list(family_model.state_dict()) == names


def test_an_extracted_sub_network_carries_the_merged_adapters(
    family_model: PreTrainedModel, ids: Tensor
) -> None:
    elastic = adapted(family_model)
    wanted = logits(elastic.activate(PART), ids)
    lora.merge(elastic)
    assert torch.allclose(logits(extract(family_model, PART), ids), wanted, atol=1e-4)


def test_a_narrow_layer_uses_views_of_the_factors(model: PreTrainedModel) -> None:
    elastic = adapted(model)
    whole = {name: getattr(model.model.layers[2].mlp, name) for name in MLP_LINEARS}
    part = elastic.activate(SubNetwork((2,), (16,))).model.layers[0].mlp
    assert part.gate_proj.up.weight.shape == (16, 4)
    assert part.gate_proj.up.weight.data_ptr() == whole["gate_proj"].up.weight.data_ptr()
    assert part.down_proj.down.weight.shape == (4, 16)
    assert part.down_proj.down.weight.data_ptr() == whole["down_proj"].down.weight.data_ptr()
    assert torch.equal(part.up_proj.weight, whole["up_proj"].weight[:16])


def test_gradients_reach_the_active_part_of_the_adapters_alone(model: PreTrainedModel, ids: Tensor) -> None:
    elastic = Elastic(model)
    with trained_parameters(elastic, CONFIG) as trained:
        whole = model.model.layers[0].mlp.gate_proj
        loss = elastic.activate(SubNetwork((0, 1), (16, 64)))(ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert whole.base.weight.grad is None
        assert whole.up.weight.grad[:16].abs().sum() > 0
        assert whole.up.weight.grad[16:].abs().sum() == 0
        elastic.reset()
        frozen = {id(p) for p in model.parameters()} - {id(p) for p in trained}
        assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) in frozen)
        assert sum(p.numel() for p in trained) == adapter_parameters(elastic.shape, 4)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(isinstance(getattr(model.model.layers[0].mlp, name), nn.Linear) for name in MLP_LINEARS)
    assert all(
        isinstance(getattr(model.model.layers[0].self_attn, name), nn.Linear) for name in ATTENTION_LINEARS
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_adapters_learn_and_leave_a_plain_model(
    model: PreTrainedModel, space: SearchSpace, text: Tensor, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    model.to(dtype)
    embeddings, norm = model.model.embed_tokens.weight.clone(), model.model.norm.weight.clone()
    config = FinetuneConfig(
        steps=40, batch=8, lr=1e-2, loss="cross-entropy", super_every=2, lora_rank=8, **changes
    )
    with torch.no_grad(), Elastic(model).activated(space.smallest) as part:
        before = float(part(text, labels=text).loss)
    names = list(model.state_dict())
    finetune(Elastic(model), space, text, config)
    with torch.no_grad(), Elastic(model).activated(space.smallest) as part:
        assert float(part(text, labels=text).loss) < before - 0.3
    assert list(model.state_dict()) == names
    assert torch.equal(embeddings, model.model.embed_tokens.weight)
    assert torch.equal(norm, model.model.norm.weight)
    assert not model.training


def test_a_checkpoint_holds_adapters_alone(
    model: PreTrainedModel, space: SearchSpace, text: Tensor, tmp_path: Path
) -> None:
    model.to(torch.bfloat16)
    elastic = Elastic(model)
    finetune(elastic, space, text, replace(CONFIG, checkpoint_minutes=0), folder=tmp_path)
    state = torch.load(tmp_path / checkpoint.NAME, weights_only=True)["optimizer"]
    adapters = adapter_parameters(elastic.shape, 4)
    assert sum(master.numel() for master in state["masters"]) == adapters
    moments = [value for kept in state["adam"]["state"].values() for value in kept.values() if value.dim()]
    assert sum(moment.numel() for moment in moments) == 2 * adapters


def curve(
    model: PreTrainedModel, space: SearchSpace, text: Tensor, folder: Path | None, kill_at: int = 0
) -> dict[int, float]:
    seen: dict[int, float] = {}

    def listen(event: Event) -> None:
        if isinstance(event, LossReported):
            seen[event.step] = event.loss
            if event.step == kill_at:
                raise KeyboardInterrupt

    config = replace(CONFIG, checkpoint_minutes=0, loss="cross-entropy")
    finetune(Elastic(model), space, text, config, listen, folder=folder)
    return seen


def test_a_killed_tuning_of_adapters_resumes_to_the_same_losses(
    space: SearchSpace, text: Tensor, tmp_path: Path
) -> None:
    straight, resumed = make_model(), make_model()
    wanted = curve(straight, space, text, None)
    with pytest.raises(KeyboardInterrupt):
        curve(make_model(), space, text, tmp_path, kill_at=4)
    found = curve(resumed, space, text, tmp_path)
    assert 1 < min(found) <= 4
    assert found == {step: pytest.approx(wanted[step], abs=1e-5) for step in range(min(found), 7)}
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_adapters_of_another_model_are_refused(space: SearchSpace, text: Tensor, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        curve(make_model(), space, text, tmp_path, kill_at=4)
    with pytest.raises(RunConflictError, match="another model"):
        curve(make_model(seed=1), space, text, tmp_path)


def test_a_broken_tuning_of_adapters_keeps_the_last_good_ones(space: SearchSpace, text: Tensor) -> None:
    model = make_model()
    before = model.model.layers[0].self_attn.q_proj.weight.clone()

    def break_at_three(event: Event) -> None:
        if isinstance(event, LossReported) and event.step == 3:
            with torch.no_grad():
                model.model.norm.weight[0] = torch.nan

    with pytest.raises(TrainingError, match="not finite at step 4"):
        finetune(Elastic(model), space, Examples.of_text(text), CONFIG, break_at_three)
    after = model.model.layers[0].self_attn.q_proj.weight
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


def test_a_seed_gives_the_same_adapters(space: SearchSpace, text: Tensor) -> None:
    first, second, other = make_model(), make_model(), make_model()
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        finetune(Elastic(model), space, text, replace(CONFIG, seed=seed))
    weights = [m.model.layers[0].self_attn.q_proj.weight for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": -1}, "rank and an alpha above 0"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "rank and an alpha above 0"),
        ({"lora_rank": 4, "train_embeddings": True, "loss": "cross-entropy"}, "leave all weights frozen"),
    ],
)
def test_wrong_adapters_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**changes)


def test_a_rank_that_spares_nothing_is_refused(
    model: PreTrainedModel, space: SearchSpace, text: Tensor
) -> None:
    with pytest.raises(InputError, match="no smaller than the model's layers"):
        finetune(Elastic(model), space, text, replace(CONFIG, lora_rank=32))
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
