"""A sub-network as an ordinary Hugging Face folder: bf16 safetensors, configuration, tokenizer.

One width throughout is a plain model of its family; different widths bring one small modelling file,
which transformers loads with ``trust_remote_code=True``. Written straight from the super-network's
files, one tensor in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.engines.source import Source
from compressor.engines.vllm_package import COMPANIONS, WEIGHTS_NAME, package_config, read_config
from compressor.engines.vllm_weights import check_tensors, plan_tensors, write_tensors
from compressor.engines.whole import whole_folder
from compressor.errors import InputError
from compressor.space import SubNetwork

MODELLING_FILE = Path(__file__).resolve().parents[1] / "supernet" / "modeling_elastic.py"
FAMILY_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def write_hf_folder(
    supernet: Path, subnet: SubNetwork, folder: Path, fields: Mapping[str, Any], *, numerics: str = "bf16"
) -> None:
    """Write a sub-network of the super-network in folder ``supernet``, in ``bf16`` or ``fp32``.

    ``fields``: ``base_model`` and ``license`` go to the model card. ``folder`` is whole or absent. Raises
    ``InputError`` for other numerics or a damaged super-network, ``PackageError`` if it cannot be written.
    """
    if numerics not in ("bf16", "fp32"):
        raise InputError(f"Hugging Face folders are written in bf16 or fp32, not in '{numerics}'")
    base = read_config(supernet)
    with whole_folder(folder) as scratch:
        entries = plan_tensors(
            Source(supernet),
            subnet,
            numerics,  # type: ignore[arg-type]
            bool(base.get("tie_word_embeddings")),
        )
        write_tensors(entries, scratch / WEIGHTS_NAME)
        check_tensors(entries, scratch / WEIGHTS_NAME)
        _write_json(scratch / "config.json", folder_config(base, subnet, numerics))
        copy_companions(supernet, scratch)
        (scratch / "README.md").write_text(_card(subnet, fields), encoding="utf-8")
        if _uneven(subnet):
            shutil.copyfile(MODELLING_FILE, scratch / MODELLING_FILE.name)


def folder_config(base: Mapping[str, Any], subnet: SubNetwork, numerics: str) -> dict[str, Any]:
    """``config.json``: read by transformers 5 and 4.57 alike, which name rotary settings differently."""
    config = package_config(base, subnet, numerics)  # type: ignore[arg-type]
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    family = str(base["model_type"])
    if not _uneven(subnet):
        return config
    stem = f"{MODELLING_FILE.stem}.Elastic{FAMILY_NAMES[family]}"
    return config | {
        "model_type": f"elastic_{family}",
        "auto_map": {"AutoConfig": f"{stem}Config", "AutoModelForCausalLM": f"{stem}ForCausalLM"},
        "per_layer_config": {str(i): {"intermediate_size": w} for i, w in enumerate(subnet.widths)},
    }


def copy_companions(supernet: Path, folder: Path) -> None:
    """The tokenizer's and generation's files, in words that transformers 4 understands too."""
    for name in COMPANIONS:
        if (supernet / name).is_file():
            shutil.copyfile(supernet / name, folder / name)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            _write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _uneven(subnet: SubNetwork) -> bool:
    return len(set(subnet.widths)) > 1


def _card(subnet: SubNetwork, fields: Mapping[str, Any]) -> str:
    lines = ["---", f"base_model: {fields.get('base_model', '')}"]
    if fields.get("license"):
        lines.append(f"license: {fields['license']}")
    flag = ", trust_remote_code=True" if _uneven(subnet) else ""
    lines += ["pipeline_tag: text-generation", "---", "", f"# {fields.get('name', '')}", ""]
    lines += [
        f"A sub-network of {fields.get('base_model', '')}: {subnet.depth} layers, MLP widths "
        f"{min(subnet.widths)} to {max(subnet.widths)}. Made by edge-compressor (method: LLaMA-NAS, "
        f"arXiv 2405.18377).",
        "",
        f"```python\nAutoModelForCausalLM.from_pretrained(FOLDER{flag})\n```",
    ]
    return "\n".join(lines) + "\n"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
