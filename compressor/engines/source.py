"""The tensors of a Hugging Face folder, checked against its configuration and read one at a time.

Read, not memory-mapped: pages of a mapped file count as this process's memory, and a 7B model has 13 GB
of them.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from compressor import models
from compressor.errors import InputError
from compressor.weight_files import AGAIN, check_weights, read_places

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Source:
    """A model folder opened for reading."""

    def __init__(self, folder: Path) -> None:
        """Raises ``InputError`` for a folder without weights, with a damaged file, or whose tensors are
        not those that its configuration asks for."""
        self.folder = folder
        self.shape = models.read_shape(models.resolve(str(folder)))
        self._places = check_weights(folder, read_places(folder), self.shape)
        if any(place.offset < 0 for place in self._places.values()):
            raise InputError(f"{folder} holds no weights (*.safetensors): save it in that format first")

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
        dtype = _DTYPES[place.dtype]
        buffer = bytearray(math.prod(dims) * dtype.itemsize)
        with place.path.open("rb") as stream:
            stream.seek(place.offset)
            if stream.readinto(buffer) != len(buffer):
                raise InputError(f"{place.path} is cut short: {AGAIN}")
        rows = torch.frombuffer(buffer, dtype=dtype).reshape(dims)
        return rows if dims == kept else rows[:, : kept[1]].contiguous()
