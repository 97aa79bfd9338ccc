"""The tensors of a vLLM package: slices of the super-network, quantized, streamed to one file.

Format: https://github.com/huggingface/safetensors; what stands for a matrix: ``vllm_schemes``.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.engines.source import Source
from compressor.engines.vllm_schemes import FLOAT_TYPES, LARGEST, Part, Scheme, VllmNumerics, parts, schemes
from compressor.errors import InputError, PackageError
from compressor.space import SubNetwork

_NAMES = {
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_WIDE_ROWS = ("mlp.gate_proj.", "mlp.up_proj.")
_WIDE_COLUMNS = "mlp.down_proj.weight"


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. ``make`` computes it; its shape and dtype are known before."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())


def plan_tensors(
    source: Source,
    subnet: SubNetwork,
    numerics: VllmNumerics,
    tied: bool,
    pad_to: int = 0,
    largest: int = LARGEST,
) -> list[Entry]:
    """The package's tensors in the order they are written, none of them read yet.

    ``tied``: the head is the embedding and is not written. ``pad_to``: zero-pad every MLP to this
    width. Raises ``InputError`` if the sub-network does not fit the source.
    """
    position = {layer: new for new, layer in enumerate(subnet.layers)}
    present = {int(found[1]) for name in source.names() if (found := _LAYER.fullmatch(name))}
    if missing := sorted(set(subnet.layers) - present):
        raise InputError(f"the super-network has no weights of layer {missing[0]}: copy it again")
    of_layer = schemes(subnet, numerics)
    entries = []
    for name in source.names():
        found = _LAYER.fullmatch(name)
        if found is None:
            if not (tied and name == "lm_head.weight"):
                entries.append(_plain(source, name, name, source.shape_of(name), FLOAT_TYPES[numerics]))
        elif (layer := int(found[1])) in position:
            new = position[layer]
            width = subnet.widths[new]
            target = f"model.layers.{new}.{found[2]}"
            padded = max(width, pad_to)
            entries += _of_layer(source, name, target, width, padded, of_layer[new], numerics, largest)
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def write_tensors(entries: Sequence[Entry], path: Path) -> None:
    """Compute and write one tensor after the other as a safetensors file.

    Holds one tensor at a time. Entries are ordered by descending element size, so that all are aligned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            stream.write(_raw(entry))
        stream.flush()
        os.fsync(stream.fileno())


def check_tensors(entries: Sequence[Entry], path: Path) -> None:
    """Read a file back and compare each tensor. Raises ``PackageError`` naming the first that differs."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        for entry in entries:
            if header.get(entry.name) is None or stream.read(entry.nbytes) != _raw(entry):
                raise PackageError(
                    f"{path}: {entry.name} was not written as meant: check the disk, try again"
                )


def _of_layer(
    source: Source,
    name: str,
    target: str,
    width: int,
    padded: int,
    scheme: Scheme,
    numerics: VllmNumerics,
    largest: int,
) -> list[Entry]:
    """A decoder layer's tensor: sliced to ``width`` neurons, padded with zeros, quantized if a matrix."""
    shape = source.shape_of(name)
    rest = target.split(".", 3)[3]
    kept, full = shape, shape
    if rest.startswith(_WIDE_ROWS):
        kept, full = (width, *shape[1:]), (padded, *shape[1:])
    elif rest == _WIDE_COLUMNS:
        kept, full = (shape[0], width), (shape[0], padded)
    if any(part > whole for part, whole in zip(kept, shape, strict=True)):
        raise InputError(f"the super-network's {name} has shape {shape}, too small for a width of {width}")
    if scheme == "float" or len(shape) == 1:
        return [_plain(source, name, target, kept, FLOAT_TYPES[numerics], full)]

    def entry(part: Part) -> Entry:
        def make() -> Tensor:
            return part.make(_padded(source.read(name, kept), full))

        return Entry(f"{target}{part.suffix}", part.dtype, part.shape, make)

    return [entry(part) for part in parts(scheme, full, largest)]


def _plain(
    source: Source,
    name: str,
    target: str,
    kept: tuple[int, ...],
    dtype: torch.dtype,
    full: tuple[int, ...] | None = None,
) -> Entry:
    shape = full or kept
    return Entry(target, dtype, shape, lambda: _padded(source.read(name, kept), shape).to(dtype))


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    padding = [size for old, new in zip(tensor.shape, shape, strict=True) for size in (new - old, 0)]
    return torch.nn.functional.pad(tensor, padding[::-1])


def _raw(entry: Entry) -> bytes:
    tensor = entry.make().contiguous()
    assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry.name
    return tensor.flatten().view(torch.uint8).numpy().tobytes()
