"""The weights of a Hugging Face folder by their files' headers: whole, and what its configuration means.

Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import InputError
from compressor.space import ModelShape

AGAIN = "copy the model folder again"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Number formats of unquantized weights."""

_SAFE, _SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_COMPUTED = "rotary_emb.inv_freq"
"""What old checkpoints store although it follows from the configuration."""
_QUANTIZED_PARTS = (
    *("weight_scale", "weight_scale_inv", "input_scale", "weight_packed", "qweight", "qzeros", "scales"),
    *("absmax", "quant_map", "quant_state", "g_idx", "SCB", "biases", "weight_zero_point"),
)
_HEADER_LIMIT = 1 << 28
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are; ``offset`` is negative for what only PyTorch finds in its own file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def weight_files(folder: Path) -> list[Path]:
    """The files that a loader takes, in order. Raises ``InputError`` where one is missing."""
    for whole, index in ((_SAFE, _SAFE_INDEX), (_BIN, _BIN_INDEX)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _shards(folder / index)
    ending = Path(_SAFE).suffix
    shards = sorted(folder.glob(f"*{ending}"))
    if shards and (folder / "adapter_config.json").is_file():
        raise _adapter(folder)
    if shards:
        raise InputError(
            f"{folder} has {shards[0].name} but no {_SAFE_INDEX}, which says what is where: {AGAIN}, whole"
        )
    raise InputError(f"{folder} holds no weights (*.safetensors): {AGAIN}")


def read_places(folder: Path) -> dict[str, Place]:
    """Every tensor of a folder by name. Raises ``InputError`` for damaged files and what is there twice."""
    places: dict[str, Place] = {}
    for path in weight_files(folder):
        found = _read_header(path) if path.suffix == ".safetensors" else _read_pickle(path)
        if twice := sorted(set(found) & set(places)):
            raise InputError(f"{folder} has the tensor {twice[0]} in two files: {AGAIN}")
        places |= found
    return places


def check_weights(folder: Path, places: Mapping[str, Place], shape: ModelShape) -> dict[str, Place]:
    """The places of the tensors that the configuration asks for.

    Raises ``InputError`` naming the first tensor that is missing, unknown, quantized, of another shape, or
    tied in the configuration and yet different.
    """
    wanted = expected_tensors(shape)
    _check_unquantized(folder, places)
    for name, dims in wanted.items():
        if name not in places:
            raise InputError(
                f"{folder} lacks the tensor {name}: it is incomplete, fetch it again{_hint(name)}"
            )
        if places[name].shape != dims:
            raise InputError(
                f"{folder}: {name} has shape {list(places[name].shape)}, its configuration says "
                f"{list(dims)}: fetch both from the same place"
            )
    for name in sorted(set(places) - set(wanted)):
        if name == "lm_head.weight":
            _check_tied(folder, places)
        elif not name.endswith(_COMPUTED):
            raise InputError(
                f"{folder} has a tensor {name} that its configuration does not know: fetch the "
                "model again, or name one of a family that is supported"
            )
    return {name: places[name] for name in wanted}


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


def _shards(index: Path) -> list[Path]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(table["weight_map"].values()))
        table["metadata"].values()  # which loaders read too
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise InputError(f"{index} is not a readable index of weights: {AGAIN}") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{index} names no files: {AGAIN}")
    for name in names:
        if not (index.parent / name).is_file():
            raise InputError(
                f"{index.parent} lacks {name}, one of its {len(names)} files of weights: {AGAIN}"
            )
    return [index.parent / name for name in names]


def _adapter(folder: Path) -> InputError:
    return InputError(
        f"{folder} holds an adapter without its model: merge the two (peft's merge_and_unload, then "
        "save_pretrained) and name that folder"
    )


def _check_unquantized(folder: Path, places: Mapping[str, Place]) -> None:
    for name, place in places.items():
        part = name.rsplit(".", 1)[-1]
        foreign = place.dtype not in ITEM_BYTES and not name.endswith(_COMPUTED)
        if foreign or part in _QUANTIZED_PARTS:
            what = f"stores {name} as {place.dtype}" if foreign else f"has a tensor {name}"
            raise InputError(
                f"{folder} is quantized (it {what}): name the model it was made from, in bf16, fp16 or fp32, "
                "or a GGUF file of it"
            )


def _check_tied(folder: Path, places: Mapping[str, Place]) -> None:
    """A head that the configuration ties must be the embedding, bit for bit."""
    head, embedding = places["lm_head.weight"], places["model.embed_tokens.weight"]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not (same and _equal(head, embedding)):
        raise InputError(
            f"{folder} has a head (lm_head.weight) of its own although its config.json says that it is the "
            'embedding: set "tie_word_embeddings" to false there if the head was trained apart, or remove it'
        )


def _equal(head: Place, embedding: Place) -> bool:
    if head.offset < 0:
        import torch

        tensors = {name: t for path in (head.path, embedding.path) for name, t in _load_pickle(path).items()}
        return torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    return all(a == b for a, b in zip(_chunks(head), _chunks(embedding), strict=True))


def _chunks(place: Place) -> Iterator[bytes]:
    """A tensor's bytes, a few at a time."""
    with place.path.open("rb") as stream:
        stream.seek(place.offset)
        for start in range(0, place.nbytes, _CHUNK):
            yield stream.read(min(_CHUNK, place.nbytes - start))


def _hint(name: str) -> str:
    if name != "lm_head.weight":
        return ""
    return ' (if its head is the embedding, set "tie_word_embeddings" to true in its config.json)'


def _read_header(path: Path) -> dict[str, Place]:
    """The tensors of one safetensors file. Raises ``InputError`` where it is damaged or cut short."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError("implausible header")
            header: dict[str, Any] = json.loads(stream.read(length), object_pairs_hook=_distinct)
        header.pop("__metadata__", None)
        places = {
            name: Place(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
            for name, entry in header.items()
        }
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{path} is damaged or cut short ({error}): {AGAIN}") from None
    if path.stat().st_size != end:
        raise InputError(
            f"{path} is damaged, perhaps cut short ({path.stat().st_size} bytes, not {end}): {AGAIN}"
        )
    return places


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _read_pickle(path: Path) -> dict[str, Place]:
    import torch

    dtypes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return {
        name: Place(path, -1, tuple(tensor.shape), dtypes.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in _load_pickle(path).items()
    }


def _load_pickle(path: Path) -> dict[str, Any]:
    """The tensors in one of PyTorch's own files, mapped rather than read."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:  # pickle, zip and torch each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:80]
        raise InputError(f"{path} is not a readable file of weights ({reason}): {AGAIN}") from None
