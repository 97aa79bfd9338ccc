"""The vLLM package of a sub-network: its own widths with our plugin, or padded for stock vLLM.

A layer of 8 bits is compressed-tensors' W8A8: INT8 weights with a scale for each output channel, activations
quantized for each token as they come; one of 4 bits its W4A16, weights in groups and activations as they
are. Written straight from the super-network's files, one tensor in memory at a time.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from compressor import __version__
from compressor.engines.model_card import write_model_card
from compressor.engines.source import Source
from compressor.engines.vllm_schemes import (
    FLOAT_TYPES,
    LARGEST,
    LARGEST_NARROW,
    VllmNumerics,
    quantization_config,
)
from compressor.engines.vllm_weights import check_tensors, plan_tensors, write_tensors
from compressor.engines.whole import whole_folder
from compressor.errors import InputError
from compressor.manifest import Accuracy, Architecture, Manifest, record_files, write_manifest
from compressor.space import SubNetwork

ELASTIC = {
    "llama": "ElasticLlamaForCausalLM",
    "mistral": "ElasticMistralForCausalLM",
    "qwen2": "ElasticQwen2ForCausalLM",
    "qwen3": "ElasticQwen3ForCausalLM",
}
"""The plugin's architecture for each family; ``serve.vllm_plugin`` registers them."""

WEIGHTS_NAME = "model.safetensors"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of the super-network's folder that a package carries unchanged, where present."""

_FOREIGN = ("auto_map", "per_layer_config", "quantization_config", "torch_dtype", "transformers_version")


def write_package(
    supernet: Path,
    subnet: SubNetwork,
    folder: Path,
    fields: Mapping[str, Any],
    *,
    numerics: str = "int8",
    portable: bool = False,
    narrow: bool = False,
    symmetric: bool = False,
    score: Callable[[Path], list[Accuracy]] | None = None,
) -> Manifest:
    """Write the package of a sub-network of the super-network in folder ``supernet``.

    ``fields`` go to the manifest (``name`` and ``base_model`` at least). ``numerics`` is ``int8`` (each layer
    in its own bits), ``int4``, ``fp8``, ``bf16`` or ``fp32``. ``portable`` zero-pads every MLP to the widest
    one, so that vLLM serves the package without our plugin, at more bytes and less speed. ``narrow`` keeps
    INT8 weights within 7 bits, for CPUs on which sums of full ones saturate (``cpu.saturates``);
    ``symmetric`` activations are for GPUs. ``folder`` must not exist; it is whole or absent, and what is on
    the disk has been compared with what was meant. ``score`` gives the accuracy of what lies in a folder, for
    the manifest and the model card.

    Raises ``InputError`` for numerics vLLM cannot serve or a damaged super-network, and
    ``PackageError`` if the package cannot be written.
    """
    _check_numerics(subnet, numerics)
    with whole_folder(folder) as scratch:
        form = _Form(cast(VllmNumerics, numerics), portable, narrow, symmetric)
        return _fill(supernet, subnet, scratch, fields, form, score)


@dataclass(frozen=True)
class _Form:
    """In what form a sub-network is packaged: see ``write_package``."""

    numerics: VllmNumerics
    portable: bool
    narrow: bool
    symmetric: bool


def package_config(
    base: Mapping[str, Any],
    subnet: SubNetwork,
    numerics: VllmNumerics,
    portable: bool = False,
    symmetric: bool = False,
) -> dict[str, Any]:
    """The package's ``config.json`` from the super-network's; ``symmetric`` activations are for GPUs.

    Raises ``InputError`` for a model that is not of a family in ``ELASTIC``.
    """
    family = str(base.get("model_type"))
    if family not in ELASTIC:
        raise InputError(f"vLLM packages are made of {', '.join(ELASTIC)} models, not of '{family}'")
    config = {name: value for name, value in base.items() if name not in _FOREIGN}
    config |= {
        "num_hidden_layers": subnet.depth,
        "intermediate_size": max(subnet.widths),
        "dtype": str(FLOAT_TYPES[numerics]).removeprefix("torch."),
    }
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer] for layer in subnet.layers]
    if "max_window_layers" in config:
        config["max_window_layers"] = sum(layer < config["max_window_layers"] for layer in subnet.layers)
    if not portable and len(set(subnet.widths)) > 1:
        config |= {"architectures": [ELASTIC[family]], "intermediate_sizes": list(subnet.widths)}
    quantized = quantization_config(subnet, numerics, symmetric)
    if quantized is not None:
        config["quantization_config"] = quantized
    return config


def _check_numerics(subnet: SubNetwork, numerics: str) -> None:
    if numerics not in FLOAT_TYPES:
        raise InputError(f"vLLM packages come in {', '.join(FLOAT_TYPES)}, not in '{numerics}'")
    if numerics == "int8" and not set(subnet.bits) <= {4, 8}:
        raise InputError(f"vLLM packages have layers of 8 or 4 bits, not of {sorted(set(subnet.bits))}")


def _fill(
    supernet: Path,
    subnet: SubNetwork,
    folder: Path,
    fields: Mapping[str, Any],
    form: _Form,
    score: Callable[[Path], list[Accuracy]] | None,
) -> Manifest:
    base = read_config(supernet)
    config = package_config(base, subnet, form.numerics, form.portable, form.symmetric)
    tied = bool(base.get("tie_word_embeddings"))
    source = Source(supernet)
    pad_to = max(subnet.widths) if form.portable else 0
    largest = LARGEST_NARROW if form.narrow else LARGEST
    entries = plan_tensors(source, subnet, form.numerics, tied, pad_to, largest)
    path = folder / WEIGHTS_NAME
    write_tensors(entries, path)
    check_tensors(entries, path)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name in COMPANIONS:
        if (supernet / name).is_file():
            shutil.copyfile(supernet / name, folder / name)
    unpadded = plan_tensors(source, subnet, "fp32", tied)
    manifest = Manifest.model_validate(
        {
            "name": base.get("_name_or_path") or supernet.name,
            "base_model": supernet.name,
            "created_by": _versions(),
            "context_length": int(base["max_position_embeddings"]),
        }
        | dict(fields)
        | {
            "engine": "vllm",
            "numerics": form.numerics,
            "narrow_weights": form.narrow,
            "architecture": Architecture(**subnet.to_dict()),
            "parameters": sum(entry.elements for entry in unpadded),
            "weight_bytes": sum(entry.nbytes for entry in entries),
        }
        | ({"accuracy": score(folder)} if score else {})
    )
    write_model_card(folder, manifest)
    manifest = manifest.model_copy(update={"files": record_files(folder)})
    write_manifest(folder, manifest)
    return manifest


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``. Raises ``InputError``."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no model (no config.json): name a super-network's folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path} is not readable JSON: copy the model folder again") from None
    return config


def _versions() -> dict[str, str]:
    return {
        "edge-compressor": __version__,
        "torch": torch.__version__,
        "safetensors": importlib.metadata.version("safetensors"),
    }
