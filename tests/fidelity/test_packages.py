"""A package's texts: what verifying says of its tokenizer and of the tokens that end a text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compressor.engines.texts_verify import prove_texts
from compressor.errors import PackageError
from tests.fidelity.test_folders import edit, put, remove


def test_the_models_vocabulary_and_the_tokenizers_are_two(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "package")
    edit("config.json", vocab_size=640)(folder)
    edit("generation_config.json", eos_token_id=[2, 0])(folder)
    line = "512 tokens have texts, of 640; a text ends at <|im_end|>, <|endoftext|>"
    assert list(prove_texts(folder)) == [line]


def test_a_package_without_ends_says_so(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "package")
    edit("config.json", eos_token_id=None)(folder)
    remove("generation_config.json")(folder)
    assert "the model names no end token" in next(prove_texts(folder))


def test_an_end_outside_the_vocabulary_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "package")
    put("genai_config.json", json.dumps({"model": {"eos_token_id": [2, 600]}}).encode())(folder)
    with pytest.raises(PackageError, match="texts end at token 600, of 512"):
        list(prove_texts(folder))


def test_a_broken_tokenizer_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "package")
    put("tokenizer.json", b"{}")(folder)
    with pytest.raises(PackageError, match="is no tokenizer"):
        list(prove_texts(folder))
