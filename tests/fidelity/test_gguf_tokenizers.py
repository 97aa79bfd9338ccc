"""Tokenizers of GGUF files give llama.cpp's ids on 200 lines of mixed text, for every kind of vocabulary."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from compressor import gguf_model, gguf_tokenizer, models
from compressor.errors import InputError
from compressor.gguf_metadata import read_fields
from tests.fidelity import llama
from tests.fidelity.files import make_model, write_model, write_vocabulary
from tests.fidelity.vocabularies import kinds, lines

KINDS = kinds()
EXPECTED: dict[str, Any] = json.loads((llama.EXPECTED / "ids.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", KINDS)
def test_ids_and_ends_are_llama_cpps(name: str, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "vocabulary.gguf", KINDS[name])
    tokenizer = gguf_model.load_tokenizer(path)
    ids = [tokenizer(line)["input_ids"] for line in lines()]
    found = llama.summary(ids, gguf_tokenizer.ends(read_fields(path)))
    wanted = EXPECTED[name]
    for line, ours, theirs in zip(lines(), found["first"], wanted["first"], strict=False):
        assert ours == theirs, line
    assert found == wanted


@pytest.mark.parametrize("name", KINDS)
def test_what_is_saved_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    tokenizer = gguf_model.load_tokenizer(write_vocabulary(tmp_path / "vocabulary.gguf", KINDS[name]))
    models.save_tokenizer(tokenizer, tmp_path / "folder")
    again = models.load_tokenizer(str(tmp_path / "folder"))
    for line in lines():
        assert again(line)["input_ids"] == tokenizer(line)["input_ids"], line
    assert (again.bos_token, again.eos_token, again.unk_token) == (
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.unk_token,
    )


@pytest.mark.skipif(not llama.LLAMA_PYTHON.is_file(), reason=llama.HOW)
def test_llama_cpp_still_gives_what_is_expected(tmp_path: Path) -> None:
    paths = [write_vocabulary(tmp_path / f"{i}.gguf", kind) for i, kind in enumerate(KINDS.values())]
    answers = llama.tokenize([(path, lines()) for path in paths])
    for name, answer in zip(KINDS, answers, strict=True):
        assert llama.summary(*answer) == EXPECTED[name], name


def test_the_lines_are_what_they_should_be() -> None:
    text = "".join(lines())
    assert len(lines()) == 200
    assert all(
        part in text for part in ("  ", "123", "é", "日本", "😀", "def f(x)", "<|im_end|>", "\t", "\r\n")
    )


def test_decomposed_text_is_composed_for_qwen2_as_its_own_tokenizer_does(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "vocabulary.gguf", KINDS["qwen2"])
    tokenizer = gguf_model.load_tokenizer(path)
    decomposed = unicodedata.normalize("NFD", "café über")
    assert tokenizer(decomposed)["input_ids"] == tokenizer("café über")["input_ids"]


def test_a_word_that_no_merge_reaches_is_one_token_for_llama3(tmp_path: Path) -> None:
    tokenizer = gguf_model.load_tokenizer(write_vocabulary(tmp_path / "v.gguf", KINDS["llama-bpe"]))
    tokens = KINDS["llama-bpe"]["tokenizer.ggml.tokens"]
    bos, word = tokens.index("<|begin_of_text|>"), tokens.index("Ġunreached")
    assert tokenizer(" unreached")["input_ids"] == [bos, word]


def test_ends_go_into_the_folder(tmp_path: Path) -> None:
    kind = KINDS["llama-bpe"]
    tokens = kind["tokenizer.ggml.tokens"]
    model = make_model("llama", len(tokens))
    source = models.resolve(str(write_model(tmp_path / "model.gguf", model, kind)))
    models.to_folder(source, tmp_path / "folder")
    generation = json.loads((tmp_path / "folder" / "generation_config.json").read_text())
    names = [tokens[i] for i in generation["eos_token_id"]]
    assert set(names) == {"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}
    assert names[0] == "<|end_of_text|>"


def test_named_templates_are_all_kept(tmp_path: Path) -> None:
    kind = {
        **KINDS["smollm"],
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}{{ messages[0].content }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    model = make_model("llama", len(kind["tokenizer.ggml.tokens"]))
    source = models.resolve(str(write_model(tmp_path / "model.gguf", model, kind)))
    models.to_folder(source, tmp_path / "folder")
    settings = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert {entry["name"] for entry in settings["chat_template"]} == {"default", "tool_use"}
    again = models.load(models.resolve(str(tmp_path / "folder"))).tokenizer
    assert set(again.chat_template) == {"default", "tool_use"}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"tokenizer.ggml.model": "bert"}, "of the kind 'bert'"),
    "split": ({"tokenizer.ggml.pre": "tekken"}, "splits text the 'tekken' way"),
    "twice": ({"tokenizer.ggml.tokens": ["a", "a"]}, "has the token 'a' twice"),
    "no merges": ({"tokenizer.ggml.merges": None}, "lacks the key tokenizer.ggml.merges"),
    "EOS outside": ({"tokenizer.ggml.eos_token_id": 99999}, "its eos token is 99999"),
    "removes spaces": ({"tokenizer.ggml.remove_extra_whitespaces": True}, "removes spaces"),
    "unknown key": ({"tokenizer.ggml.byte_order": 3}, r"tokenizer\.ggml\.byte_order is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_tokenizer_that_is_not_understood_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    kind = {k: v for k, v in (KINDS["smollm"] | changes).items() if v is not None}
    model = make_model("llama", len(kind["tokenizer.ggml.tokens"]))
    with pytest.raises(InputError, match=message):
        models.resolve(str(write_model(tmp_path / "model.gguf", model, kind)))
