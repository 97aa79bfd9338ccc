"""GGUF files, which llama.cpp and Ollama run: a sub-network's tensors and metadata, streamed to one file.

Sub-networks with a width for each layer are written as architecture ``deci``, the one of llama.cpp's that
has an array of feed-forward lengths; others as the model's own. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from compressor import models
from compressor.engines.gguf_vocabulary import vocabulary
from compressor.engines.source import Source
from compressor.engines.whole import whole_file
from compressor.errors import InputError
from compressor.gguf_model import LAYER_NAMES, OUTER_NAMES
from compressor.space import ModelShape, SubNetwork

GgufNumerics = Literal["q8_0", "bf16", "fp32"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
UNEVEN = "deci"
BLOCK = 32
"""Weights of a Q8_0 block."""
_TYPES = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "fp32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written; ``read`` gives it in fp32."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], npt.NDArray[np.float32]]

    def encoded(self) -> npt.NDArray[Any]:
        return np.asarray(quantize(self.read(), self.kind))

    @property
    def nbytes(self) -> int:
        elements = int(np.prod(self.shape))
        if self.kind == GGMLQuantizationType.Q8_0:
            return elements // BLOCK * (BLOCK + 2)
        return elements * (2 if self.kind == GGMLQuantizationType.BF16 else 4)


def write_gguf(
    supernet: Path, subnet: SubNetwork, path: Path, fields: Mapping[str, Any], *, numerics: str = "q8_0"
) -> None:
    """Write a sub-network of the super-network in folder ``supernet`` as one GGUF file.

    ``fields``: ``name``, ``base_model`` and ``license`` go to the metadata. ``numerics`` is ``q8_0``,
    ``bf16`` or ``fp32``. One tensor is in memory at a time; ``path`` is whole or absent. Raises
    ``InputError`` for what llama.cpp cannot run.
    """
    if numerics not in _TYPES:
        raise InputError(f"GGUF files are written in {', '.join(_TYPES)}, not in '{numerics}'")
    shape = models.read_shape(models.resolve(str(supernet)))
    config = json.loads((supernet / "config.json").read_text(encoding="utf-8"))
    architecture = _architecture(config, subnet)
    tensors = list(_tensors(Source(supernet), shape, config, subnet, _TYPES[numerics][0]))
    with whole_file(path) as scratch:
        writer = GGUFWriter(scratch, architecture)
        _add_metadata(writer, shape, config, subnet, fields, _TYPES[numerics][1])
        _add_vocabulary(writer, vocabulary(supernet, shape.vocab_size))
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(tensor.encoded())
        finally:
            writer.close()


def _architecture(config: Mapping[str, Any], subnet: SubNetwork) -> str:
    family = str(config.get("model_type"))
    if family not in ARCHITECTURES:
        raise InputError(f"GGUF files are made of {', '.join(ARCHITECTURES)} models, not of '{family}'")
    if len(set(subnet.widths)) == 1:
        return ARCHITECTURES[family]
    if ARCHITECTURES[family] != "llama":
        raise InputError(
            f"llama.cpp runs a width for each layer in Llama and Mistral models alone, not in '{family}': "
            "choose a sub-network of one width, or another format"
        )
    return UNEVEN


def _add_metadata(
    writer: GGUFWriter,
    shape: ModelShape,
    config: Mapping[str, Any],
    subnet: SubNetwork,
    fields: Mapping[str, Any],
    file_type: LlamaFileType,
) -> None:
    writer.add_name(str(fields.get("name", "")))
    if fields.get("license"):
        writer.add_license(str(fields["license"]))
    if fields.get("base_model"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, str(fields["base_model"]))
    writer.add_description(f"{subnet.depth} layers, widths {min(subnet.widths)} to {max(subnet.widths)}")
    uneven = len(set(subnet.widths)) > 1
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(subnet.depth)
    writer.add_feed_forward_length(list(subnet.widths) if uneven else subnet.widths[0])
    writer.add_head_count([shape.num_heads] * subnet.depth if uneven else shape.num_heads)
    writer.add_head_count_kv([shape.num_kv_heads] * subnet.depth if uneven else shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)


def _add_vocabulary(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _tensors(
    source: Source,
    shape: ModelShape,
    config: Mapping[str, Any],
    subnet: SubNetwork,
    kind: GGMLQuantizationType,
) -> Iterator[_Tensor]:
    """The file's tensors in order, none of them read yet."""
    pairwise = ARCHITECTURES[str(config["model_type"])] == "llama"
    if _rope(config).get("rope_type", "default") != "default":
        yield _rope_factors(config, shape)
    for theirs, ours in OUTER_NAMES.items():
        name = f"{ours}.weight"
        if theirs == "output" and shape.tie_word_embeddings:
            continue
        yield _tensor(source, name, f"{theirs}.weight", source.shape_of(name), kind)
    for position, (layer, width) in enumerate(zip(subnet.layers, subnet.widths, strict=True)):
        for theirs, ours in LAYER_NAMES.items():
            for suffix in ("weight", "bias"):
                name = f"model.layers.{layer}.{ours}.{suffix}"
                if name not in source:
                    continue
                kept = _kept(theirs, source.shape_of(name), width)
                heads = {"attn_q": shape.num_heads, "attn_k": shape.num_kv_heads}.get(theirs, 0)
                target = f"blk.{position}.{theirs}.{suffix}"
                yield _tensor(source, name, target, kept, kind, heads if pairwise else 0)


def _kept(role: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The part of a layer's tensor that ``width`` neurons use."""
    if role in ("ffn_gate", "ffn_up"):
        return (width, *shape[1:])
    return (shape[0], width) if role == "ffn_down" and len(shape) == 2 else shape


def _tensor(
    source: Source,
    name: str,
    target: str,
    kept: tuple[int, ...],
    kind: GGMLQuantizationType,
    heads: int = 0,
) -> _Tensor:
    """``heads``: lay the rotary halves of that many heads pairwise, as llama.cpp's Llamas want them."""

    def read() -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = source.read(name, kept).float().numpy()
        return _pairwise(values, heads) if heads else values

    if len(kept) == 1 or (kind == GGMLQuantizationType.Q8_0 and kept[1] % BLOCK):
        kind = GGMLQuantizationType.F32
    return _Tensor(target, kept, kind, read)


def _pairwise(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _rope_factors(config: Mapping[str, Any], shape: ModelShape) -> _Tensor:
    """What llama.cpp divides each rotary frequency by (Llama 3's scaling)."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = str(_rope(config)["rope_type"])
    if kind != "llama3":
        raise InputError(f"rotary scaling '{kind}' is not written to GGUF here: choose another format")
    settings = {name: value for name, value in config.items() if name != "model_type"}
    rope = LlamaRotaryEmbedding(AutoConfig.for_model(str(config["model_type"]), **settings))
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    factors = float(_rope(config)["rope_theta"]) ** -exponents / rope.inv_freq
    return _Tensor("rope_freqs.weight", tuple(factors.shape), GGMLQuantizationType.F32, factors.numpy)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, whichever transformers wrote them."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0), **scaling}
