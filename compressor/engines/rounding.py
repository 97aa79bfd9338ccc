"""A model's rounded matrices: kept beside its weights, put into PyTorch, read by every writer of packages.

What scoring computes with, what a tuning learns with and what a package holds is one and the same rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.engines.quantize import Quantized, quantize
from compressor.errors import InputError, PackageError
from compressor.space import SubNetwork

FOLDER, FILE = "rounding", "matrices.safetensors"
EMBED, HEAD = "model.embed_tokens", "lm_head"
_PARTS = ("integers", "scales", "zeros")


class Rounding:
    """Rounded matrices by their modules' names and bits; any that is not among them rounds to the nearest, by
    ``nearest``."""

    def __init__(
        self,
        matrices: Mapping[tuple[str, int], Quantized] | None = None,
        nearest: Callable[[Tensor, int], Quantized] = quantize,
    ) -> None:
        self._matrices = dict(matrices or {})
        self._nearest = nearest

    def __len__(self) -> int:
        return len(self._matrices)

    def items(self) -> Iterable[tuple[tuple[str, int], Quantized]]:
        return self._matrices.items()

    def of(self, name: str, weight: Tensor, bits: int) -> Quantized:
        """The matrix of the module ``name`` in so many bits; ``weight`` [N, K] is what it is unrounded."""
        known = self._matrices.get((name, bits))
        return self._nearest(weight, bits) if known is None else known

    def values(self, name: str, weight: Tensor, bits: int) -> Tensor:
        """The same as numbers, in the weight's own numerics and shape, on its device."""
        with torch.no_grad():
            found = self.of(name, weight, bits).values(weight.shape[1])
            return found.to(weight.device, weight.dtype).contiguous()

    def save(self, model_folder: Path) -> None:
        """Keep it beside a model's weights. Raises ``PackageError`` where the disk refuses."""
        tensors = {
            f"{name}.{bits}.{part}": getattr(matrix, part).contiguous().cpu()
            for (name, bits), matrix in self._matrices.items()
            for part in _PARTS
            if getattr(matrix, part) is not None
        }
        path = rounding_file(model_folder)
        scratch = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, scratch)
            scratch.replace(path)
        except (OSError, SafetensorError) as error:
            scratch.unlink(missing_ok=True)
            raise PackageError(
                f"{path} could not be written ({error}): free disk space and try again"
            ) from error

    @classmethod
    def load(cls, model_folder: Path, nearest: Callable[[Tensor, int], Quantized] = quantize) -> Rounding:
        """What ``save`` kept beside a model; an empty one where nothing is. Raises ``InputError``."""
        path = rounding_file(model_folder)
        if not path.is_file():
            return cls(nearest=nearest)
        parts: dict[tuple[str, int], dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as stream:
                for key in list(stream.keys()):
                    name, bits, part = key.rsplit(".", 2)
                    parts.setdefault((name, int(bits)), {})[part] = stream.get_tensor(key)
            matrices = {
                (name, bits): Quantized(found["integers"], found["scales"], found.get("zeros"), bits)
                for (name, bits), found in parts.items()
            }
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{path} is damaged ({error}): delete its folder and resume the run") from None
        return cls(matrices, nearest)


def rounding_file(model_folder: Path) -> Path:
    return model_folder / FOLDER / FILE


def head_module(tied: bool) -> str:
    """The module whose rounding the head's is: a tied head is the embeddings."""
    return EMBED if tied else HEAD


class RoundedWeights:
    """A model's matrices rounded to each of ``bits`` (layers) and ``outer_bits`` (embeddings and head); one
    set at a time is in the model.

    Rounds the model in place and keeps a copy for each number of bits. Inputs are not rounded. Blocks run
    along a matrix's inputs, so that widths of whole blocks cut what is rounded as if it had been rounded
    after.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bits: Collection[int],
        outer_bits: Collection[int],
        rounding: Rounding | None = None,
    ) -> None:
        rounding = rounding or Rounding()
        self._layers = [
            [_Choice(module, rounding, name, bits) for name, module in layer_linears(model, index)]
            for index in range(len(model.model.layers))
        ]
        embed: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        tied = head.weight is embed.weight
        self._embed = _Choice(embed, rounding, EMBED, outer_bits)
        self._head = None if tied else _Choice(head, rounding, HEAD, outer_bits)
        if tied:
            self._embed.modules.append(head)
            self._embed.put(max(outer_bits))

    def choose(self, subnet: SubNetwork) -> None:
        """Put each of the sub-network's matrices in its bits. Raises ``KeyError`` for bits not given."""
        for index, bits in zip(subnet.layers, subnet.bits, strict=True):
            for choice in self._layers[index]:
                choice.put(bits)
        self._embed.put(subnet.embed_bits)
        if self._head is not None:
            self._head.put(subnet.head_bits)


class _Choice:
    """One matrix in each of its bits, of which one is in its modules."""

    def __init__(self, module: Any, rounding: Rounding, name: str, bits: Iterable[int]) -> None:
        self.modules = [module]
        weight = module.weight.detach()
        self._weights = {each: rounding.values(name, weight, each) for each in sorted(bits)}
        self.put(max(self._weights))

    def put(self, bits: int) -> None:
        for module in self.modules:
            module.weight.data = self._weights[bits]


def layer_linears(model: PreTrainedModel, index: int) -> list[tuple[str, nn.Linear]]:
    """A layer's linears with their names in the model."""
    layer: Any = model.model.layers[index]
    return [
        (f"model.layers.{index}.{name}", module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
