"""ONNX Runtime packages: a folder that stock onnxruntime-genai and ``compress serve`` load.

Folder: model.onnx, model.onnx.data (just the bytes that the sub-network needs), genai_config.json,
config.json, generation_config.json, tokenizer files, README.md, manifest.json; kv_scales.npz where it is
served with keys and values in INT8, which the graph itself keeps in fp32.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx

from compressor.engines.memory import package_bytes
from compressor.engines.model_card import write_model_card
from compressor.engines.onnx_graph import build_graph
from compressor.engines.onnx_store import ALIGNMENT, SOURCE_FOLDER, Export, TensorRef
from compressor.engines.whole import whole_folder
from compressor.errors import PackageError
from compressor.int8_cache import SCALES_FILE, CacheScales
from compressor.manifest import Architecture, Manifest, record_files, write_manifest
from compressor.space import Numerics, SubNetwork, parameter_count, weight_bytes

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
SIZE_TOLERANCE = 0.01
_COPY_BYTES = 1 << 22


def write_package(
    export: Export,
    subnet: SubNetwork,
    folder: Path,
    fields: Mapping[str, Any],
    *,
    numerics: Numerics = "int8",
    fine_inputs: Sequence[str] = (),
    scales: CacheScales | None = None,
) -> Manifest:
    """Write a sub-network's package and return its manifest.

    ``fields`` are manifest entries (at least ``name`` and ``base_model``; accuracy, speed, budgets
    ...) that are not known from the export; ``fine_inputs`` names matrices whose inputs are not rounded,
    see ``onnx_exact``; ``scales``, its own layers', let it be served with keys and values in INT8.
    ``folder`` must not exist; it is whole or absent.
    Raises ``InputError`` or ``PackageError``.
    """
    with whole_folder(folder) as scratch:
        return _fill(export, subnet, scratch, fields, numerics, fine_inputs, scales)


def _fill(
    export: Export,
    subnet: SubNetwork,
    folder: Path,
    fields: Mapping[str, Any],
    numerics: Numerics,
    fine_inputs: Sequence[str],
    scales: CacheScales | None,
) -> Manifest:
    tensors = _copy_tensors(export, export.tensors(subnet, numerics), folder / DATA_FILE)
    graph = build_graph(export.shape, export.constants, tensors, fine_inputs=frozenset(fine_inputs))
    onnx.save_model(graph, folder / GRAPH_FILE)
    if scales is not None:
        scales.save(folder / SCALES_FILE)
    _check_size(folder / DATA_FILE, package_bytes(export.shape, subnet, numerics))
    for path in sorted((export.folder / SOURCE_FOLDER).iterdir()):
        shutil.copyfile(path, folder / path.name)
    _write_config(folder, subnet)
    _write_genai_config(export, subnet, folder)
    manifest = Manifest(
        engine="onnxruntime",
        numerics=numerics,
        architecture=Architecture(**subnet.to_dict()),
        parameters=parameter_count(export.shape, subnet),
        weight_bytes=weight_bytes(export.shape, subnet, numerics),
        context_length=export.constants.context_length,
        created_by=_versions(),
        fine_inputs=list(fine_inputs),
        kv_cache="fp32" if scales is None else "int8",
        **fields,
    )
    write_model_card(folder, manifest)
    manifest = manifest.model_copy(update={"files": record_files(folder)})
    write_manifest(folder, manifest)
    return manifest


def _copy_tensors(export: Export, tensors: Mapping[str, TensorRef], path: Path) -> dict[str, TensorRef]:
    """Copy the tensors' bytes into one file, those shared by two roles once; returns where they went."""
    placed: dict[tuple[str, int, int], int] = {}
    moved: dict[str, TensorRef] = {}
    with path.open("wb") as out:
        for name, ref in tensors.items():
            key = (ref.file, ref.offset, ref.bytes)
            if key not in placed:
                out.write(b"\0" * (-out.tell() % ALIGNMENT))
                placed[key] = out.tell()
                _copy_bytes(export.folder / ref.file, ref.offset, ref.bytes, out)
            moved[name] = replace(ref, file=path.name, offset=placed[key])
        out.flush()
        os.fsync(out.fileno())
    return moved


def _copy_bytes(source: Path, offset: int, count: int, out: Any) -> None:
    with source.open("rb") as stream:
        stream.seek(offset)
        while count:
            chunk = stream.read(min(count, _COPY_BYTES))
            if not chunk:
                raise PackageError(f"{source} is cut short: delete the export and run again")
            out.write(chunk)
            count -= len(chunk)


def _check_size(path: Path, predicted: int) -> None:
    actual = path.stat().st_size
    if abs(actual - predicted) > SIZE_TOLERANCE * predicted:
        raise PackageError(
            f"{path.name} has {actual} bytes where {predicted} were computed: report this as a bug"
        )


def _write_config(folder: Path, subnet: SubNetwork) -> None:
    """The model's config with the sub-network's layers and widths."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["num_hidden_layers"] = subnet.depth
    config["intermediate_size"] = max(subnet.widths)
    if len(set(subnet.widths)) > 1:
        config["intermediate_sizes"] = list(subnet.widths)
    for name in ("layer_types", "dtype", "torch_dtype"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_genai_config(export: Export, subnet: SubNetwork, folder: Path) -> None:
    """What stock onnxruntime-genai reads: the decoder's dimensions, names and token ids."""
    shape = export.shape
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = folder / "generation_config.json"
    tokens = config | (json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {})
    end = tokens.get("eos_token_id")
    first_end = end[0] if isinstance(end, list) else end
    begin, padding = tokens.get("bos_token_id"), tokens.get("pad_token_id")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH_FILE,
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": subnet.depth,
        "num_key_value_heads": shape.num_kv_heads,
    }
    model = {
        "bos_token_id": first_end if begin is None else begin,
        "context_length": export.constants.context_length,
        "decoder": decoder,
        "eos_token_id": end,
        "pad_token_id": first_end if padding is None else padding,
        "type": str(config["model_type"]),
        "vocab_size": shape.vocab_size,
    }
    search = {
        "do_sample": False,
        "max_length": export.constants.context_length,
        "num_beams": 1,
        "past_present_share_buffer": True,
        "temperature": float(tokens.get("temperature") or 1.0),
        "top_k": int(tokens.get("top_k") or 50),
        "top_p": float(tokens.get("top_p") or 1.0),
    }
    text = json.dumps({"model": model, "search": search}, indent=2)
    (folder / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("edge-compressor", "onnxruntime", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
