"""Packaging for both engines at the shape of LLaMA2-7B: one matrix in memory at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.models import read_shape, resolve
from compressor.space import SubNetwork, weight_bytes
from tests.conftest import make_tiny_model

HIDDEN, WIDTH, VOCABULARY = 4096, 11008, 32000

PACKAGE = """
import json, resource, sys, time
from pathlib import Path
from compressor.engines.memory import peak_bytes, reset_peak, resident_bytes
from compressor.engines import vllm_package
from compressor.engines.onnx_export import export
from compressor.engines.onnx_package import write_package
from compressor.space import SubNetwork
engine, source, scratch, subnet = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
import torch, transformers
before, began = resident_bytes(), time.monotonic()
reset_peak()
subnet = SubNetwork.from_dict(subnet)
fields = {"name": "x", "base_model": "x"}
if engine == "onnxruntime":
    write_package(export(source, scratch / "export"), subnet, scratch / "package", fields)
else:
    vllm_package.write_package(source, subnet, scratch / "package", fields)
print(json.dumps([peak_bytes() - before, time.monotonic() - began]))
"""


def llama2_7b(folder: Path, layers: int) -> int:
    """Shards of LLaMA2-7B's shapes with random weights, one a layer; returns their bytes."""
    make_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "vocab_size": VOCABULARY, "head_dim": 128}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    matrices = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
    matrices |= {
        "mlp.gate_proj": (WIDTH, HIDDEN),
        "mlp.up_proj": (WIDTH, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDTH),
    }
    shards = {
        f"layer{i}.safetensors": {f"model.layers.{i}.{name}.weight": dims for name, dims in matrices.items()}
        | {
            f"model.layers.{i}.{norm}.weight": (HIDDEN,)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for i in range(layers)
    }
    outer = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shards["outer.safetensors"] = outer | {"model.norm.weight": (HIDDEN,)}
    total = 0
    for name, tensors in shards.items():
        save_file(
            {t: torch.randn(dims, dtype=torch.bfloat16) * 0.02 for t, dims in tensors.items()}, folder / name
        )
        total += (folder / name).stat().st_size
    index = {"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


@pytest.fixture(params=[2, 32], ids=["two", "whole"])
def large(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, SubNetwork]]:
    """A model of LLaMA2-7B's shape and a sub-network of it, half the layers at half the width."""
    layers = request.param
    llama2_7b(tmp_path / "source", layers)
    yield tmp_path / "source", SubNetwork(tuple(range(layers)), (WIDTH, WIDTH // 2) * (layers // 2))
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_both_packages_take_less_memory_than_the_sub_network_and_half_an_hour(
    large: tuple[Path, SubNetwork],
) -> None:
    source, subnet = large
    bf16_bytes = weight_bytes(read_shape(resolve(str(source))), subnet, "bf16")
    total = 0.0
    for engine in ("onnxruntime", "vllm"):
        scratch = source.parent / engine
        scratch.mkdir()
        arguments = [engine, str(source), str(scratch), json.dumps(subnet.to_dict())]
        done = subprocess.run(
            [sys.executable, "-c", PACKAGE, *arguments], check=True, capture_output=True, text=True
        )
        peak, seconds = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(scratch)
        total += seconds
        figures = f"{bf16_bytes / 1e9:.1f} GB in {seconds:.0f} s, peak {peak / 1e9:.2f} GB"
        print(f"{engine}, {subnet.depth} layers: {figures}")
        assert peak < 1.2 * bf16_bytes
    assert total < 1800
