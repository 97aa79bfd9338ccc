"""An export: the super-network's quantized tensors in one file, and the slices a sub-network takes.

Folder of an export:
    weights.bin      every tensor, each at a multiple of ``ALIGNMENT`` bytes
    down-WIDTH.bin   down projections cut to a width, made when a sub-network first asks
    export.json      shape, source, and the table of tensors
    source/          config, generation config and tokenizer of the super-network

The rows of gate and up projections are neurons, sorted by importance, so a narrower layer is a
prefix of the same bytes. The down projection's neurons are its columns: a narrower one is a cut at
whole blocks and has bytes of its own. Needs numpy alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.errors import InputError, PackageError
from compressor.space import QUANT_BLOCK, ModelShape, Numerics, SubNetwork, in_numerics

ALIGNMENT = 64
WEIGHTS_FILE = "weights.bin"
INDEX_FILE = "export.json"
SOURCE_FOLDER = "source"
FORMAT_VERSION = 3
DTYPES: Mapping[str, type[np.generic]] = {
    "uint8": np.uint8,
    "uint16": np.uint16,
    "float16": np.float16,
    "float32": np.float32,
}
"""uint16 stands for the bits of bfloat16, which numpy lacks."""
UNQUANTIZED = 16
"""Bits of the weights of a bf16 package."""


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor's bytes are: row-major, ``dims`` elements of ``dtype`` from ``offset`` on."""

    file: str
    offset: int
    dims: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * np.dtype(self.dtype).itemsize

    def prefix(self, rows: int) -> TensorRef:
        """The first rows of this tensor, the same bytes."""
        return replace(self, dims=(rows, *self.dims[1:]))

    def reshaped(self, *dims: int) -> TensorRef:
        if math.prod(dims) != math.prod(self.dims):
            raise ValueError(f"{dims} does not hold {self.dims}")
        return replace(self, dims=dims)


@dataclass(frozen=True)
class Constants:
    """What a graph needs beside tensors."""

    norm_epsilon: float
    context_length: int
    local_window: int = -1
    rope_scale: float = 1.0


class TensorFile:
    """A file of aligned tensors being written; ``table`` collects where they are."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._name = path.name
        self.table: dict[str, TensorRef] = {}

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        self._stream.write(b"\0" * (-self._stream.tell() % ALIGNMENT))
        self.table[name] = TensorRef(self._name, self._stream.tell(), array.shape, array.dtype.name)
        self._stream.write(np.ascontiguousarray(array).data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()


class Export:
    """A finished export, opened for reading. Make it with ``onnx_export.export``."""

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        constants: Constants,
        table: Mapping[str, TensorRef],
        bits: tuple[int, ...],
        weights_hash: str,
    ) -> None:
        self.folder = folder
        self.shape = shape
        self.constants = constants
        self.bits = bits
        self.weights_hash = weights_hash
        self._table = dict(table)
        self._down = {shape.intermediate_size: self._table}

    @property
    def source(self) -> Path:
        """The super-network's config and tokenizer files."""
        return self.folder / SOURCE_FOLDER

    def tensors(self, subnet: SubNetwork, numerics: Numerics = "int8") -> dict[str, TensorRef]:
        """The tensors of a sub-network by role, layers renumbered from 0; quantized matrices have scales.

        Raises ``InputError`` for bits that were not exported or layers the model lacks, ``PackageError``
        where the disk refuses the cut of a width that was not asked for before.
        """
        embed, head = self._outer_bits(subnet, numerics)
        self._require_bits({embed, head, *self._layer_bits(subnet, numerics)})
        tied = self.shape.tie_word_embeddings
        table = {
            "norm": self._table["norm"],
            "inverse_frequencies": self._table["inverse_frequencies"],
            **_matrix(self._table, f"head.{head}", "head"),
            **_matrix(self._table, f"head.{head}" if tied else f"embed.{embed}", "embed"),
        }
        if numerics != "bf16":
            rows = table["embed.weight"]
            table["embed.weight"] = rows.reshaped(rows.dims[0], rows.bytes // rows.dims[0])
        for position, (layer, width, bits) in enumerate(
            zip(subnet.layers, subnet.widths, self._layer_bits(subnet, numerics), strict=True)
        ):
            roles = self._layer(layer, width, bits)
            table |= {f"layers.{position}.{role}": ref for role, ref in roles.items()}
        return table

    def read(self, ref: TensorRef) -> npt.NDArray[Any]:
        """The tensor's values, memory-mapped."""
        return np.memmap(
            self.folder / ref.file, dtype=DTYPES[ref.dtype], mode="r", offset=ref.offset, shape=ref.dims
        )

    def prepare(self, widths: Iterator[int] | tuple[int, ...]) -> None:
        """Cut the down projections to these widths now rather than at first use."""
        for width in sorted(set(widths)):
            self._down_table(width)

    def save(self) -> None:
        index = {
            "format_version": FORMAT_VERSION,
            "shape": asdict(self.shape),
            "constants": asdict(self.constants),
            "bits": list(self.bits),
            "weights_hash": self.weights_hash,
            "tensors": {name: asdict(ref) for name, ref in self._table.items()},
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")

    def _layer_bits(self, subnet: SubNetwork, numerics: Numerics) -> tuple[int, ...]:
        if numerics not in ("int8", "int4", "bf16"):
            raise InputError(
                f"ONNX Runtime packages are int8, int4 or bf16, not {numerics}: set the profile's numerics"
            )
        if subnet.layers and max(subnet.layers) >= self.shape.num_layers:
            raise InputError(
                f"{self.folder} has {self.shape.num_layers} layers: {subnet.layers} does not fit"
            )
        return (UNQUANTIZED,) * subnet.depth if numerics == "bf16" else in_numerics(subnet, numerics).bits

    @staticmethod
    def _outer_bits(subnet: SubNetwork, numerics: Numerics) -> tuple[int, int]:
        """Of the embeddings and of the head."""
        return (UNQUANTIZED, UNQUANTIZED) if numerics == "bf16" else in_numerics(subnet, numerics).outer

    def _require_bits(self, wanted: set[int]) -> None:
        if missing := sorted(wanted - set(self.bits)):
            raise InputError(f"{self.folder} lacks {missing[0]}-bit weights: export it again with them")

    def _layer(self, layer: int, width: int, bits: int) -> dict[str, TensorRef]:
        stem = f"layers.{layer}."
        table = {
            role[len(stem) :]: ref
            for role, ref in self._table.items()
            if role.startswith(stem) and role.count(".") == 2
        }
        for matrix in ("qkv", "o"):
            table |= _matrix(self._table, f"{stem}{matrix}.{bits}", matrix)
        for matrix in ("gate", "up"):
            whole = _matrix(self._table, f"{stem}{matrix}.{bits}", matrix)
            table |= {role: ref.prefix(width) for role, ref in whole.items()}
            if f"{matrix}_bias" in table:
                table[f"{matrix}_bias"] = table[f"{matrix}_bias"].prefix(width)
        return table | _matrix(self._down_table(width), f"{stem}down.{bits}", "down")

    def _down_table(self, width: int) -> Mapping[str, TensorRef]:
        """Down projections at this width: the export's own if full, else a file cut once."""
        if width not in self._down:
            index = self.folder / f"down-{width}.json"
            if not index.is_file():
                self._cut_down(width, index)
            self._down[width] = _table_from_json(json.loads(index.read_text(encoding="utf-8")))
        return self._down[width]

    def _cut_columns(self, role: str, ref: TensorRef, width: int) -> npt.NDArray[Any]:
        """The first ``width`` columns of the tensor ``layers.LAYER.down.BITS.PART``, in whole blocks."""
        stem, part = role.rsplit(".", 1)
        bits, values = int(stem.rsplit(".", 1)[1]), self.read(ref)
        if bits == UNQUANTIZED:
            return values[:, :width]
        block = QUANT_BLOCK[bits]
        blocks = -(-width // block)
        if part == "zeros":
            return values[:, : -(-blocks * bits // 8)]
        if part == "scales" or width % block == 0:
            return values[:, :blocks]
        kept = np.array(values[:, :blocks])
        zeros = self._table.get(f"{stem}.zeros")
        _fill_tail(kept, width, bits, None if zeros is None else self.read(zeros))
        return kept

    def _cut_down(self, width: int, index: Path) -> None:
        name = f"down-{width}.bin"
        partial, partial_index = (self.folder / f"{part}.tmp{os.getpid()}" for part in (name, index.name))
        try:
            with TensorFile(partial) as file:
                for role, ref in self._table.items():
                    if ".down." in role:
                        file.add(role, self._cut_columns(role, ref, width))
            table = {role: asdict(replace(ref, file=name)) for role, ref in file.table.items()}
            partial_index.write_text(json.dumps(table), encoding="utf-8")
            partial.replace(self.folder / name)
            partial_index.replace(index)
        except OSError as error:
            raise PackageError(
                f"{self.folder / name} could not be written ({error}): free disk space and try again"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
            partial_index.unlink(missing_ok=True)


def _matrix(table: Mapping[str, TensorRef], name: str, role: str) -> dict[str, TensorRef]:
    """A matrix's weight and, if it is quantized, its scales and zero points, under its role in a graph."""
    parts = (part for part in ("weight", "scales", "zeros") if f"{name}.{part}" in table)
    return {f"{role}.{part}": table[f"{name}.{part}"] for part in parts}


def _fill_tail(integers: npt.NDArray[Any], width: int, bits: int, zeros: npt.NDArray[Any] | None) -> None:
    """Set the columns from ``width`` to the end of the last block, integers [N, blocks, bytes], to 0."""
    a_byte = 8 // bits
    last = integers[:, -1]
    zero: Any = 2 ** (bits - 1)
    if zeros is not None:
        place = integers.shape[1] - 1
        zero = (zeros[:, place // a_byte] >> (bits * (place % a_byte))) & (2**bits - 1)
    filled = np.asarray(zero * (0x11 if bits == 4 else 1), np.uint8)[..., None]
    kept = width - (integers.shape[1] - 1) * last.shape[1] * a_byte
    first = -(-kept // a_byte)
    last[:, first:] = filled
    if kept % a_byte:
        last[:, first - 1 : first] = (last[:, first - 1 : first] & 0x0F) | (filled & 0xF0)


def open_export(folder: Path) -> Export:
    """The export in a folder. Raises ``InputError`` where there is none, or one of another format."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{folder} holds no finished export: delete it and run again") from None
    if index["format_version"] != FORMAT_VERSION:
        raise InputError(f"{folder} has format {index['format_version']}, not {FORMAT_VERSION}: delete it")
    table = _table_from_json(index["tensors"])
    weights = folder / WEIGHTS_FILE
    if not weights.is_file() or weights.stat().st_size < max(
        ref.offset + ref.bytes for ref in table.values()
    ):
        raise InputError(f"{weights} is missing or cut short: delete {folder} and run again")
    return Export(
        folder,
        ModelShape(**index["shape"]),
        Constants(**index["constants"]),
        table,
        tuple(index["bits"]),
        index["weights_hash"],
    )


def _table_from_json(entries: Mapping[str, Any]) -> dict[str, TensorRef]:
    return {
        name: TensorRef(e["file"], e["offset"], tuple(e["dims"]), e["dtype"]) for name, e in entries.items()
    }
