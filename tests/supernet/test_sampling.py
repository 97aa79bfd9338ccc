"""Text that the model writes: its own words, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from compressor import models
from compressor.space import SubNetwork
from compressor.supernet.elastic import Elastic
from compressor.supernet.sampling import CachedDecoder, sample_text
from compressor.supernet.targets import final_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def test_the_decoder_computes_the_models_logits(family_model: PreTrainedModel, ids: Tensor) -> None:
    ids = ids[:, :6]  # inside every sliding window
    decoder = CachedDecoder(family_model, 3, 6)
    decoder(ids[:, :4])
    last = [decoder(ids[:, 4:5]), decoder(ids[:, 5:])]
    wanted = family_model(ids).logits
    assert torch.allclose(torch.stack(last, 1), wanted[:, 4:], atol=1e-4)


@torch.no_grad()
def test_the_decoder_follows_an_active_sub_network(model: PreTrainedModel, ids: Tensor) -> None:
    with Elastic(model).activated(SubNetwork((1, 3), (16, 32))) as part:
        assert torch.allclose(CachedDecoder(part, 3, 12)(ids), part(ids).logits[:, -1], atol=1e-4)


def test_the_same_seed_gives_the_same_text(tiny: models.LoadedModel) -> None:
    first = sample_text(tiny.model, tiny.tokenizer, 6, 24, seed=3).ids
    assert first.shape == (6, 24)
    assert torch.equal(first, sample_text(tiny.model, tiny.tokenizer, 6, 24, seed=3).ids)
    assert not torch.equal(first, sample_text(tiny.model, tiny.tokenizer, 6, 24, seed=4).ids)
    assert first.min() >= 0


def test_every_second_text_is_a_chat_turn(tiny: models.LoadedModel) -> None:
    texts = sample_text(tiny.model, tiny.tokenizer, 4, 24).ids
    user = [tiny.tokenizer.decode(row).startswith("<|im_end|>\n<|im_start|>user\n") for row in texts]
    assert user == [False, True, False, True]


def test_cold_text_is_what_the_model_finds_likeliest(tiny: models.LoadedModel) -> None:
    texts = sample_text(tiny.model, tiny.tokenizer, 2, 16, temperature=1e-4).ids
    with torch.no_grad():
        likeliest = tiny.model(texts).logits.argmax(-1)
    assert torch.equal(texts[0, 4:], likeliest[0, 3:-1])


def test_the_targets_are_what_a_pass_over_the_text_gives(tiny: models.LoadedModel) -> None:
    sampled = sample_text(tiny.model, tiny.tokenizer, 4, 24)
    with torch.no_grad():
        states = final_states(tiny.model, sampled.ids)
        logits = tiny.model.lm_head(states)
    assert torch.allclose(sampled.targets.states, states, atol=1e-4)
    chosen = logits.gather(-1, sampled.targets.likely.long())
    assert (chosen >= logits.topk(chosen.shape[-1]).values[..., -1:] - 1e-4).all()


def test_progress_ends_at_the_total(tiny: models.LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    sample_text(tiny.model, tiny.tokenizer, 3, 8, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (24, 24)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_text_that_was_being_written_when_killed_goes_on_to_the_same(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    loaded = models.load(models.resolve(str(tiny_model_folder)), torch.float32)

    class KilledError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done > total / 2:
            raise KilledError

    settings = {"sequences": 12, "length": 10, "seed": 3, "batch": 4}
    whole = sample_text(loaded.model, loaded.tokenizer, **settings)
    with pytest.raises(KilledError):
        sample_text(loaded.model, loaded.tokenizer, **settings, progress=kill, folder=tmp_path / "parts")
    kept = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert kept == ["batch-0.pt"]
    seen: list[int] = []
    again = sample_text(
        loaded.model,
        loaded.tokenizer,
        **settings,
        progress=lambda done, _: seen.append(done),
        folder=tmp_path / "parts",
    )
    assert torch.equal(again.ids, whole.ids) and torch.equal(again.targets.states, whole.targets.states)
    assert seen[0] == 4 * 10, "the first batch is not written again"
