"""A package's texts: what verifying says of its tokenizer and of the tokens that end a text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compressor.engines import served
from compressor.errors import PackageError
from tests.fidelity.test_folders import edit, put, remove


def test_the_models_vocabulary_and_the_tokenizers_are_two(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "package")
    edit("config.json", vocab_size=640)(folder)
    edit("generation_config.json", eos_token_id=[2, 0])(folder)
    said = list(served.prove(folder, 640))
    assert said[1:3] == ["512 tokens have texts, of 640", "texts end with '<|im_end|>', '<|endoftext|>'"]
    assert "over 640 tokens" in said[3]


def test_a_package_without_ends_says_so(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "package")
    edit("config.json", eos_token_id=None)(folder)
    remove("generation_config.json")(folder)
    assert "no token ends a text: every answer runs to its limit" in list(served.prove(folder, 512))


def test_an_end_outside_the_vocabulary_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "package")
    put("genai_config.json", json.dumps({"model": {"eos_token_id": [2, 600]}}).encode())(folder)
    with pytest.raises(PackageError, match="600] is no token of the model"):
        list(served.prove(folder, 512))


def test_a_broken_tokenizer_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "package")
    put("tokenizer.json", b"{}")(folder)
    with pytest.raises(PackageError, match="is not a tokenizer"):
        list(served.prove(folder, 512))
