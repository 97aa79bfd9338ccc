"""vLLM packages of the unpruned starter in every form: bytes, and how well their weights predict wikitext-2.

Weights are read back from the packages and put into PyTorch, which shows what rounding them costs; inputs are
not rounded, as they are in W8A8 and FP8. Needs ../shared/data. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor import models
from compressor.engines.vllm_package import write_package
from compressor.engines.vllm_schemes import dequantize_groups
from compressor.space import SubNetwork

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2" / "test.txt"
ROWS, LENGTH = 8, 256


def main() -> int:
    if not TEXT.is_file():
        print(f"no text at {TEXT}: nothing to measure")
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = models.to_folder(models.resolve("starter"), Path(scratch) / "starter")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = TEXT.read_text(encoding="utf-8")[: 12 * ROWS * LENGTH]
        ids = torch.tensor(tokenizer(text)["input_ids"][: ROWS * LENGTH]).reshape(ROWS, LENGTH)
        shape = models.shape_of_config(model.config)
        layers = tuple(range(shape.num_layers))
        widths = (shape.intermediate_size,) * len(layers)
        every_second = tuple(4 if layer % 2 else 8 for layer in layers)
        for name, numerics, bits in (
            ("bf16", "bf16", ()),
            ("FP8", "fp8", ()),
            ("W8A8", "int8", ()),
            ("every second layer in 4 bits", "int8", every_second),
            ("W4A16", "int4", ()),
        ):
            package = Path(scratch) / numerics / str(len(bits))
            fields = {"name": name, "base_model": "starter"}
            subnet = SubNetwork(layers, widths, bits)
            manifest = write_package(folder, subnet, package, fields, numerics=numerics)
            _put(model, load_file(package / "model.safetensors"))
            rows.append({"form": name, "bytes": manifest.weight_bytes, "nll": _nll(model, ids)})
            print(
                f"{name:30s}{manifest.weight_bytes / 1e6:8.1f} MB{rows[-1]['nll']:8.4f} nats a token",
                flush=True,
            )
    print(json.dumps(rows))
    return 0


@torch.no_grad()
def _put(model: torch.nn.Module, stored: dict[str, torch.Tensor]) -> None:
    """A package's weights in place of the model's."""
    for name, parameter in model.named_parameters():
        if f"{name}_packed" in stored:
            parameter.copy_(dequantize_groups(stored[f"{name}_packed"], stored[f"{name}_scale"]))
        elif f"{name}_scale" in stored:
            parameter.copy_(stored[name].float() * stored[f"{name}_scale"])
        elif name in stored:
            parameter.copy_(stored[name].float())


@torch.inference_mode()
def _nll(model: torch.nn.Module, ids: torch.Tensor) -> float:
    losses = [float(model(row[None], labels=row[None]).loss) for row in ids]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    sys.exit(main())
