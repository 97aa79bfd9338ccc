"""Agreement with the unpruned model on its own text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.errors import InputError
from compressor.evaluation.agreement import AgreementText, logits_predict, torch_predict


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 512, (12, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def text(model: PreTrainedModel, ids: torch.Tensor) -> AgreementText:
    return AgreementText.build(ids, torch_predict(model), seed=7)


def test_a_model_agrees_with_itself(text: AgreementText, model: PreTrainedModel) -> None:
    score = text.score(torch_predict(model), "search")
    assert score.value == 1.0
    assert score.low < 1.0
    assert score.n == 6 * (24 - text.skip)


def test_top_choices_are_the_models_own(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = model(ids).logits.argmax(-1).numpy()
    assert np.array_equal(torch_predict(model)(ids.numpy()), expected)


def test_disagreements_are_counted_where_they_are_scored(text: AgreementText, model: PreTrainedModel) -> None:
    def wrong_at_first_positions(ids: np.ndarray) -> np.ndarray:
        top = torch_predict(model)(ids).copy()
        top[:, : text.skip + 5] = -1
        return top

    score = text.score(wrong_at_first_positions, "report")
    assert score.value == pytest.approx(1 - 5 / 20)


def test_an_engine_is_scored_by_its_logits(text: AgreementText, model: PreTrainedModel) -> None:
    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)[None]).logits[0].numpy()

    assert text.score(logits_predict(logits), "report").value == 1.0


def test_splits_share_no_sequence(text: AgreementText) -> None:
    search, report = text.rows("search"), text.rows("report")
    assert not set(search) & set(report)
    assert len(search) + len(report) == 12


def test_a_stored_text_scores_without_the_unpruned_model(text: AgreementText, tmp_path: Path) -> None:
    text.save(tmp_path / "text.npz")
    again = AgreementText.load(tmp_path / "text.npz")
    assert again.task_key("search") == text.task_key("search")
    assert again.score(lambda ids: np.zeros_like(ids), "search") == text.score(
        lambda ids: np.zeros_like(ids), "search"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["text.npz"]


def test_a_damaged_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_bytes(b"PK no")
    with pytest.raises(InputError, match=r"text\.npz"):
        AgreementText.load(tmp_path / "text.npz")


def test_keys_tell_splits_limits_and_texts_apart(text: AgreementText, model: PreTrainedModel) -> None:
    other = AgreementText.build(text.ids[::-1].copy(), torch_predict(model), seed=7)
    keys = {text.task_key("search"), text.task_key("report"), text.task_key("search", 3)}
    keys.add(other.task_key("search"))
    assert len(keys) == 4


def test_too_little_text_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="at least 4 sequences"):
        AgreementText.build(torch.zeros(3, 20, dtype=torch.long), torch_predict(model))


def test_a_race_against_itself_runs_to_the_end_and_a_hopeless_one_stops(
    model: PreTrainedModel,
) -> None:
    ids = torch.randint(0, 512, (80, 12), generator=torch.Generator().manual_seed(1))
    text = AgreementText.build(ids, torch_predict(model))
    whole = text.score(torch_predict(model), "search")
    even = text.race(torch_predict(model), [whole.items])
    assert even.dominated_by is None and even.score == whole and even.saved == 0
    hopeless = text.race(lambda ids: np.full_like(ids, -1), [whole.items])
    assert hopeless.dominated_by == 0
    assert hopeless.saved >= 0.5
    assert hopeless.score.value < whole.value
