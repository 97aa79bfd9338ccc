"""Model folders as a source: checked before anything is written, whoever writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.engines.gguf_file import write_gguf
from compressor.engines.hf_folder import write_hf_folder
from compressor.engines.onnx_export import export
from compressor.engines.source import Source
from compressor.engines.vllm_package import write_package
from compressor.errors import InputError
from compressor.space import SubNetwork
from tests.conftest import make_tiny_model

UNIFORM = SubNetwork((0, 2), (64, 64))
WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "onnx": lambda source, out: export(source, out),
    "vllm": lambda source, out: write_package(source, UNIFORM, out, {}),
    "hf": lambda source, out: write_hf_folder(source, UNIFORM, out, {}),
    "gguf": lambda source, out: write_gguf(source, UNIFORM, out, {}),
}
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        lambda folder: _change(folder, lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        r"lacks the tensor model\.layers\.2\.mlp\.up_proj\.weight",
    ),
    "extra": (
        lambda folder: _change(
            folder, lambda t: t.update({"model.layers.0.mlp.experts.weight": torch.ones(2)})
        ),
        r"model\.layers\.0\.mlp\.experts\.weight that its configuration does not know",
    ),
    "shape": (
        lambda folder: _change(folder, lambda t: t.update({"model.norm.weight": torch.ones(9)})),
        r"model\.norm\.weight has shape \[9\]",
    ),
    "cut short": (
        lambda folder: _write(folder, lambda content: content[:-1000]),
        r"model\.safetensors is damaged, perhaps cut short",
    ),
    "no header": (
        lambda folder: _write(folder, lambda _: b"\xff" * 64),
        r"model\.safetensors is damaged or cut short",
    ),
    "empty": (lambda folder: _write(folder, lambda _: b""), r"model\.safetensors is damaged"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_named_and_leaves_nothing(
    tiny_model_folder: Path, tmp_path: Path, writer: str, damage: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_folder, source)
    hurt, message = DAMAGES[damage]
    hurt(source)
    with pytest.raises(InputError, match=message):
        WRITERS[writer](source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    Source(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(InputError, match=shard.name):
        Source(folder)


def test_leading_parts_are_read(tiny_model_folder: Path) -> None:
    stored = load_file(tiny_model_folder / "model.safetensors")
    source = Source(tiny_model_folder)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(source.read(name), stored[name])
    assert torch.equal(source.read(name, (64, 48)), stored[name][:, :48])
    assert torch.equal(source.read(name, (10, 128)), stored[name][:10])


def test_what_follows_from_the_configuration_may_be_stored(tiny_model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_folder, source)
    head = load_file(source / "model.safetensors")["model.embed_tokens.weight"].clone()
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": head}
    _change(source, lambda tensors: tensors.update(old))
    assert not set(old) & set(Source(source).names())
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"]


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _write(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
