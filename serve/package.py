"""A package folder, opened for serving: manifest, graph, tokenizer, chat template, end tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.chat_template import ChatTemplates, read_templates
from compressor.errors import PackageError
from compressor.int8_cache import SCALES_FILE, CacheScales
from compressor.manifest import CacheNumerics, Manifest, read_manifest
from serve.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedPackage:
    """What the server needs of a package for ONNX Runtime."""

    folder: Path
    manifest: Manifest
    graph: Path
    kv_heads: int
    head_dim: int
    eos_tokens: frozenset[int]
    tokenizer: Tokenizer
    template: ChatTemplates | None

    def cache_scales(self, kv_cache: CacheNumerics | None = None) -> CacheScales | None:
        """For keys and values in INT8, if they are asked for or the package was measured with them; else
        None. Raises ``PackageError`` where the package has none."""
        if (kv_cache or self.manifest.kv_cache) == "fp32":
            return None
        return CacheScales.load(self.folder / SCALES_FILE)


def open_package(folder: Path) -> ServedPackage:
    """Read everything but the weights. Raises ``PackageError`` for what is missing or damaged."""
    manifest = read_manifest(folder)
    if manifest.engine != "onnxruntime":
        raise PackageError(f"{folder} is a package for {manifest.engine}, not for onnxruntime")
    _require_files(folder, manifest)
    decoder, model = _read_genai_config(folder)
    return ServedPackage(
        folder=folder,
        manifest=manifest,
        graph=folder / decoder["filename"],
        kv_heads=int(decoder["num_key_value_heads"]),
        head_dim=int(decoder["head_size"]),
        eos_tokens=_token_set(model.get("eos_token_id")),
        tokenizer=Tokenizer(folder / "tokenizer.json"),
        template=read_templates(folder),
    )


def _require_files(folder: Path, manifest: Manifest) -> None:
    """Sizes only: hashing gigabytes is for whoever copies a package, not for every start."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise PackageError(f"{folder}: {name} is missing: copy the package again")
        if path.stat().st_size != record.bytes:
            raise PackageError(f"{folder}: {name} is cut short or altered: copy the package again")


def _read_genai_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / "genai_config.json"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        return model["decoder"], model
    except (OSError, ValueError, KeyError) as error:
        raise PackageError(f"{path} is missing or damaged ({error}): make the package again") from None


def _token_set(tokens: int | list[int] | None) -> frozenset[int]:
    if tokens is None:
        return frozenset()
    return frozenset([tokens] if isinstance(tokens, int) else tokens)
