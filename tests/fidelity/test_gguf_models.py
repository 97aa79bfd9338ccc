"""Models of GGUF files compute what their own folders and llama.cpp compute, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import models
from compressor.errors import InputError
from tests.fidelity import llama
from tests.fidelity.files import make_model, write_model
from tests.fidelity.ropes import IDS, KINDS, reference, vocabulary, write_rope

FIRST: dict[str, str] = json.loads((llama.EXPECTED / "first_choices.json").read_text(encoding="utf-8"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_rotary_scaling_is_the_folders_and_llama_cpps(name: str, tmp_path: Path) -> None:
    source = models.resolve(str(write_rope(tmp_path / "model.gguf", name)))
    loaded = models.load(source, torch.float32).model
    own = logits(reference(name))
    found = logits(loaded)
    assert (found - own).abs().max() < 1e-3
    assert (found.argmax(-1) == own.argmax(-1)).float().mean() >= 0.999
    theirs = torch.tensor([int(i) for i in FIRST[name].split()])
    assert (found.argmax(-1) == theirs).float().mean() >= 0.97  # near ties fall either way in fp32


@pytest.mark.parametrize("name", ["llama3", "yarn", "linear", "factors of no rule"])
def test_rotary_scaling_stays_in_the_folder_that_is_written(name: str, tmp_path: Path) -> None:
    source = models.resolve(str(write_rope(tmp_path / "model.gguf", name)))
    loaded = models.load(source, torch.float32).model
    models.to_folder(source, tmp_path / "folder")
    again = models.load(models.resolve(str(tmp_path / "folder")), torch.float32).model
    assert torch.equal(again.model.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq)
    assert again.model.rotary_emb.attention_scaling == loaded.model.rotary_emb.attention_scaling


def test_the_kinds_are_not_the_same_model() -> None:
    assert len({FIRST[name] for name in ("default", "linear", "llama3, trained on short texts")}) == 3


@pytest.mark.skipif(not llama.LLAMA_PYTHON.is_file(), reason=llama.HOW)
def test_llama_cpp_gives_our_logits(tmp_path: Path) -> None:
    paths = {name: write_rope(tmp_path / f"{i}.gguf", name) for i, name in enumerate(KINDS)}
    answers = llama.logits([(path, IDS) for path in paths.values()])
    for (name, path), theirs in zip(paths.items(), answers, strict=True):
        found = logits(models.load(models.resolve(str(path)), torch.float32).model)
        wanted = torch.tensor(theirs)
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max(), name
        assert " ".join(map(str, wanted.argmax(-1).tolist())) == FIRST[name], name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "longrope": ({"rope__scaling__type": "longrope"}, "scaled the 'longrope' way"),
    "YaRN's logarithm": ({"rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1"),
    "turned in part": ({"rope__dimension_count": 8}, "dimension_count is 8, its heads have 16"),
    "values of another size": ({"attention__value_length": 8}, "value_length is 8"),
    "window": ({"attention__sliding_window": 16}, "attention over 16 tokens"),
    "experts": ({"expert_count": 4}, "expert_count is 4"),
    "encoder": ({"attention__causal": False}, "from left to right"),
    "scaled logits": ({"logit_scale": 0.5}, "logit_scale is 0.5"),
    "scaled attention": ({"attention__scale": 0.5}, "not the usual 0.25"),
    "widths by layer": ({"feed_forward_length": [96, 64]}, "differs by layer"),
    "embeddings": ({"pooling_type": 1}, "pooling_type is 1"),
    "vocabulary": ({"vocab_size": 9}, "vocab_size is 9"),
    "unknown": ({"attention__key_magic": 1}, r"llama\.attention\.key_magic is unknown"),
    "lacks a key": ({"context_length": None}, r"lacks the key llama\.context_length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_that_makes_another_model_is_refused(case: str, tmp_path: Path) -> None:
    keys, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        models.resolve(str(write_model(tmp_path / "m.gguf", reference("default"), vocabulary(), **keys)))


WITHOUT_EFFECT: dict[str, Any] = {
    "rope__dimension_count": 16,
    "attention__value_length": 16,
    "attention__key_length": 16,
    "attention__sliding_window": 4096,
    "attention__scale": 0.25,
    "attention__causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope__scaling__finetuned": False,
    "feed_forward_length": [96, 96],
}


def test_keys_that_say_the_usual_are_followed(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", reference("default"), vocabulary(), **WITHOUT_EFFECT)
    loaded = models.load(models.resolve(str(path)), torch.float32).model
    assert torch.allclose(logits(loaded), logits(reference("default")), atol=1e-4)


def test_an_ollama_blob_is_a_gguf_file_without_an_ending(tmp_path: Path) -> None:
    keys = {**vocabulary(), "general.name": "Small Llama"}
    path = write_model(tmp_path / "sha256-0123abcd", reference("default"), keys)
    source = models.resolve(str(path))
    assert (source.kind, source.name) == ("gguf", "Small Llama")
    assert torch.allclose(
        logits(models.load(source, torch.float32).model), logits(reference("default")), atol=1e-4
    )


def test_an_ending_in_capitals_is_the_same(tmp_path: Path) -> None:
    path = write_model(tmp_path / "MODEL.GGUF", reference("default"), vocabulary())
    assert models.resolve(str(path)).kind == "gguf"


NOT_WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "a part": ({"split.count": 3, "split.no": 0}, "one of the 3 parts.*llama-gguf-split --merge"),
    "adapter": ({"general.type": "adapter"}, "merge it into its base model"),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_what_is_no_whole_model_says_how_to_make_it_one(case: str, tmp_path: Path) -> None:
    keys, message = NOT_WHOLE[case]
    with pytest.raises(InputError, match=message):
        models.resolve(str(write_model(tmp_path / "m.gguf", reference("default"), vocabulary() | keys)))


def test_factors_where_none_belong_are_refused(tmp_path: Path) -> None:
    model = make_model("qwen2", len(vocabulary()["tokenizer.ggml.tokens"]))
    path = write_model(tmp_path / "m.gguf", model, vocabulary(), {"rope_freqs.weight": torch.ones(8)})
    with pytest.raises(InputError, match="where none belongs"):
        models.resolve(str(path))


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", reference("default"), vocabulary(), embedding_length=128)
    with pytest.raises(InputError, match="has shape"):
        models.resolve(str(path))


def test_a_key_of_another_form_is_no_bug(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", reference("default"), vocabulary(), rope__scaling__factor="twice")
    with pytest.raises(InputError, match="has a key of another form"):
        models.resolve(str(path))
