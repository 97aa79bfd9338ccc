"""The tensors of a Hugging Face folder, checked against its configuration and read one at a time.

Read, not memory-mapped: pages of a mapped file count as this process's memory, and a 7B model has 13 GB
of them. Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import models
from compressor.errors import InputError
from compressor.space import ModelShape

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COMPUTED = "rotary_emb.inv_freq"
"""What old checkpoints store although it follows from the configuration."""
_HEADER_LIMIT = 1 << 28


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Source:
    """A model folder opened for reading."""

    def __init__(self, folder: Path) -> None:
        """Raises ``InputError`` for a folder without weights, with a damaged file, or whose tensors are
        not those that its configuration asks for."""
        self.folder = folder
        self.shape = models.read_shape(models.resolve(str(folder)))
        self._places: dict[str, _Place] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._places |= _read_header(path)
        if not self._places:
            raise InputError(f"{folder} holds no weights (*.safetensors): copy the model folder again")
        self._check()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        return sorted(self._places)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def read(self, name: str, kept: tuple[int, ...] | None = None) -> Tensor:
        """A tensor, or its leading part of shape ``kept``."""
        place = self._places[name]
        kept = kept or place.shape
        dims = (kept[0], *place.shape[1:])
        buffer = bytearray(math.prod(dims) * place.dtype.itemsize)
        with place.path.open("rb") as stream:
            stream.seek(place.offset)
            if stream.readinto(buffer) != len(buffer):
                raise InputError(f"{place.path} is cut short: copy the model folder again")
        rows = torch.frombuffer(buffer, dtype=place.dtype).reshape(dims)
        return rows if dims == kept else rows[:, : kept[1]].contiguous()

    def _check(self) -> None:
        wanted = expected_tensors(self.shape)
        for name, dims in wanted.items():
            if name not in self._places:
                raise InputError(f"{self.folder} lacks the tensor {name}: it is incomplete, fetch it again")
            if self._places[name].shape != dims:
                raise InputError(
                    f"{self.folder}: {name} has shape {list(self._places[name].shape)}, its configuration "
                    f"says {list(dims)}: fetch both from the same place"
                )
        for name in sorted(set(self._places) - set(wanted)):
            if not name.endswith(_COMPUTED) and name != "lm_head.weight":
                raise InputError(
                    f"{self.folder} has a tensor {name} that its configuration does not know: fetch the "
                    "model again, or name one of a family that is supported"
                )
            del self._places[name]


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors; a tied head is none."""
    hidden = shape.hidden_size
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        stem = f"model.layers.{layer}."
        tensors |= {f"{stem}{name}": dims for name, dims in _layer_tensors(shape).items()}
    return tensors


def _layer_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    attention = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")]
    mlp = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    biased = dict.fromkeys(attention[:3], shape.qkv_bias) | {attention[3]: shape.o_bias}
    biased |= dict.fromkeys(mlp, shape.mlp_bias)
    matrices = (*shape.attention_matrices(), *shape.mlp_matrices(shape.intermediate_size))
    tensors: dict[str, tuple[int, ...]] = {}
    for name, dims in zip([*attention, *mlp], matrices, strict=True):
        tensors[f"{name}.weight"] = dims
        if biased[name]:
            tensors[f"{name}.bias"] = dims[:1]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{norm}.weight"] = (shape.hidden_size,)
    if shape.qk_norm:
        tensors |= {f"self_attn.{head}_norm.weight": (shape.head_dim,) for head in ("q", "k")}
    return tensors


def _read_header(path: Path) -> dict[str, _Place]:
    """The tensors of one file. Raises ``InputError`` where it is damaged or cut short."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError("implausible header")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        places = {
            name: _Place(
                path,
                8 + length + entry["data_offsets"][0],
                tuple(entry["shape"]),
                _DTYPES[entry["dtype"]],
            )
            for name, entry in header.items()
        }
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise InputError(f"{path} is damaged or cut short ({error}): copy the model folder again") from None
    if path.stat().st_size != end:
        raise InputError(
            f"{path} is damaged, perhaps cut short ({path.stat().st_size} bytes, not {end}): "
            "copy the model folder again"
        )
    return places
