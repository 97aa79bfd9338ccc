"""GGUF files: read back they are the sub-network; llama.cpp, where it is installed, speaks its text."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from compressor import models
from compressor.engines.gguf_file import write_gguf
from compressor.engines.gguf_vocabulary import vocabulary
from compressor.errors import InputError
from compressor.gguf_metadata import read_fields
from compressor.space import SubNetwork
from tests.conftest import make_tiny_model
from tests.engines.reference import cut
from tests.engines.test_onnx_graph import make_relative

UNIFORM = SubNetwork((0, 2), (64, 64))
UNEVEN = SubNetwork((0, 1, 3), (128, 64, 96))
FIELDS = {"name": "tiny", "base_model": "random-llama", "license": "apache-2.0"}
IDS = torch.arange(3, 40)[None]
LLAMA_PYTHON = Path(__file__).resolve().parents[2] / ".venv-llama" / "bin" / "python"
SPEAK = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=128, n_threads=1, verbose=False)
ids, text = json.loads(sys.argv[2]), []
for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
    text.append(token)
    if len(text) == 12:
        break
print(json.dumps([text, model.tokenize(sys.argv[3].encode(), add_bos=True, special=True)]))
"""
TEXT = "Tabs\t and 123 numbers\n  é 日本 <|im_start|>user"


@pytest.mark.parametrize(("numerics", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-5), ("q8_0", 0.05)])
@torch.no_grad()
def test_one_width_reads_back_as_the_sub_network(
    tiny_model_folder: Path, tmp_path: Path, numerics: str, tolerance: float
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model_folder, UNIFORM, path, FIELDS, numerics=numerics)
    loaded = models.load(models.resolve(str(path)), torch.float32)
    expected = cut(tiny_model_folder, UNIFORM)(IDS).logits
    assert (loaded.model(IDS).logits - expected).abs().max() < tolerance * expected.abs().max()
    assert models.resolve(str(path)).license == "apache-2.0"


@pytest.mark.parametrize("family", ["biased llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_other_families_read_back(tiny_model_folder: Path, tmp_path: Path, family: str) -> None:
    folder = make_relative(tiny_model_folder, tmp_path / "model", family)
    write_gguf(folder, UNIFORM, tmp_path / "model.gguf", FIELDS, numerics="fp32")
    loaded: PreTrainedModel = models.load(models.resolve(str(tmp_path / "model.gguf")), torch.float32).model
    assert torch.allclose(loaded(IDS).logits, cut(folder, UNIFORM)(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_speaks_like_transformers(tmp_path: Path, tied: bool) -> None:
    if not LLAMA_PYTHON.is_file():
        pytest.skip("llama.cpp is not installed: make setup-llama")
    folder = make_tiny_model(tmp_path / "model", tie_word_embeddings=tied, initializer_range=0.2)
    write_gguf(folder, UNEVEN, tmp_path / "model.gguf", FIELDS, numerics="fp32")
    prompt = [5, 17, 301, 44, 9]
    model = cut(folder, UNEVEN)
    theirs = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
    )
    command = [str(LLAMA_PYTHON), "-c", SPEAK, str(tmp_path / "model.gguf"), json.dumps(prompt), TEXT]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    text, ids = json.loads(done.stdout)
    assert text == theirs[0, len(prompt) :].tolist() and len(set(text)) > 3
    assert ids == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def test_the_starters_vocabulary_is_read_back_unchanged(starter: Path) -> None:
    metadata = vocabulary(starter, 49152)
    theirs = read_fields(Path(models.resolve("starter").location))
    for key in ("tokens", "merges", "token_type", "model", "pre", "bos_token_id", "eos_token_id"):
        assert metadata[f"tokenizer.ggml.{key}"] == theirs[f"tokenizer.ggml.{key}"], key
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_a_vocabulary_smaller_than_the_models_is_padded(tiny_model_folder: Path) -> None:
    metadata = vocabulary(tiny_model_folder, 520)
    assert metadata["tokenizer.ggml.tokens"][512:] == [f"[PAD{i}]" for i in range(512, 520)]
    assert set(metadata["tokenizer.ggml.token_type"][512:]) == {5}


def test_what_llama_cpp_cannot_run_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="int4"):
        write_gguf(tiny_model_folder, UNIFORM, tmp_path / "x.gguf", FIELDS, numerics="int4")
    qwen = make_relative(tiny_model_folder, tmp_path / "model", "qwen3")
    with pytest.raises(InputError, match="Llama and Mistral"):
        write_gguf(qwen, UNEVEN, tmp_path / "x.gguf", FIELDS)
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        write_gguf(tiny_model_folder, UNIFORM, tmp_path / "there.gguf", FIELDS)
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert not (tmp_path / "x.gguf").exists()
