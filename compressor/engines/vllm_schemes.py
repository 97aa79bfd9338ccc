"""How a vLLM package's matrices are quantized: compressed-tensors' scheme of each, and its tensors.

Format: https://github.com/vllm-project/compressed-tensors. A matrix is one of
- ``int8``: W8A8, symmetric integers with one fp32 scale for each output channel;
- ``int4``: W4A16, symmetric integers in groups of 32 inputs, eight packed in an int32, scales in bf16;
- ``fp8``: W8A8 in float8_e4m3fn, one fp32 scale for each output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.engines.quantize import quantize_evenly
from compressor.errors import InputError
from compressor.space import QUANT_BLOCK, ModelShape, SubNetwork

VllmNumerics = Literal["int8", "int4", "fp8", "bf16", "fp32"]
"""Of a package: its layers are all of one scheme, but for ``int8``, where each has 8 or 4 bits."""
Scheme = Literal["int8", "int4", "fp8", "float"]

FLOAT_TYPES: dict[str, torch.dtype] = {
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
    "fp8": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
"""What stays in floating point under each numerics: embeddings, norms, biases."""

LARGEST, LARGEST_NARROW = 127, 63
"""The largest weight of a row in INT8, and where CPUs add two products of bytes in 16 bits: 2 * 255 * 63 fits
there, more would saturate. (oneDNN's developer guide, "Nuances of int8 computations".)"""
LARGEST_FP8 = 448.0
"""Of float8_e4m3fn."""
GROUP = QUANT_BLOCK[4]
"""Inputs that share a scale in 4 bits."""
GROUP_SCALE = torch.bfloat16
PACKED = 8
"""Weights of 4 bits in an int32."""
SHAPE_BYTES = 16
"""Of a matrix in 4 bits: its shape, two int64, which the format wants beside it."""
FORMATS = {"int8": "int-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}


@dataclass(frozen=True)
class Part:
    """A tensor that stands for a matrix, or for some of it; ``make`` computes it from the matrix."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor]


def schemes(subnet: SubNetwork, numerics: VllmNumerics) -> tuple[Scheme, ...]:
    """Of each of the sub-network's layers."""
    if numerics == "int8":
        of_bits: dict[int, Scheme] = {4: "int4", 8: "int8"}
        return tuple(of_bits[bits] for bits in subnet.bits)
    whole: dict[str, Scheme] = {"int4": "int4", "fp8": "fp8"}
    return (whole.get(numerics, "float"),) * subnet.depth


def parts(scheme: Scheme, shape: Sequence[int], largest: int = LARGEST) -> list[Part]:
    """The tensors of a matrix [N, K] under a scheme, by what follows ``….weight``. Raises ``InputError`` for
    a matrix whose inputs don't fill whole groups."""
    rows, columns = shape
    scales = (rows, 1)
    if scheme == "int8":
        return [
            Part("", torch.int8, (rows, columns), lambda m: quantize_channels(m, largest)),
            Part("_scale", torch.float32, scales, lambda m: channel_scales(m, largest)),
        ]
    if scheme == "fp8":
        return [
            Part("", torch.float8_e4m3fn, (rows, columns), quantize_fp8),
            Part("_scale", torch.float32, scales, fp8_scales),
        ]
    if columns % GROUP:
        raise InputError(f"a matrix of {columns} inputs does not fill whole groups of {GROUP} in 4 bits")
    return [
        Part("_packed", torch.int32, (rows, columns // PACKED), lambda m: quantize_groups(m)[0]),
        Part("_scale", GROUP_SCALE, (rows, columns // GROUP), lambda m: quantize_groups(m)[1]),
        Part("_shape", torch.int64, (2,), lambda m: torch.tensor(m.shape, dtype=torch.int64)),
    ]


def channel_scales(weight: Tensor, largest: float = LARGEST) -> Tensor:
    """The scale of each output channel of a matrix [N, K]: fp32 [N, 1], 1 for a row of zeros."""
    scales = weight.float().abs().amax(dim=1, keepdim=True) / largest
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def quantize_channels(weight: Tensor, largest: int = LARGEST) -> Tensor:
    """A matrix [N, K] as int8 multiples of ``channel_scales``."""
    scaled = weight.float() / channel_scales(weight, largest)
    return scaled.round_().clamp_(-largest, largest).to(torch.int8)


def fp8_scales(weight: Tensor) -> Tensor:
    return channel_scales(weight, LARGEST_FP8)


def quantize_fp8(weight: Tensor) -> Tensor:
    """A matrix [N, K] as float8_e4m3fn multiples of ``fp8_scales``."""
    return (weight.float() / fp8_scales(weight)).clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [N, K] in 4 bits: int32 [N, K / 8], the first weight in the lowest bits; scales [N, K / 32].

    The integers are those of ONNX Runtime's blocks, whose bytes are packed just so.
    """
    matrix = quantize_evenly(weight, 4)
    packed = matrix.integers.reshape(len(weight), -1).contiguous().view(torch.int32)
    return packed, matrix.scales.to(GROUP_SCALE)


def dequantize_groups(packed: Tensor, scales: Tensor) -> Tensor:
    """The fp32 matrix [N, K] that ``quantize_groups`` stands for."""
    shifts = 4 * torch.arange(PACKED, dtype=torch.int32)
    integers = ((packed[..., None] >> shifts) & 15).flatten(1) - 8
    return integers.float() * scales.float().repeat_interleave(GROUP, dim=1)


def matrix_bytes(scheme: Scheme, rows: int, columns: int) -> int:
    """Bytes of a matrix [rows, columns] under a scheme that quantizes it."""
    if scheme == "int4":
        scales = rows * -(-columns // GROUP) * GROUP_SCALE.itemsize
        return rows * columns // 2 + scales + SHAPE_BYTES
    return rows * columns + 4 * rows


def packaged_bytes(shape: ModelShape, subnet: SubNetwork, numerics: VllmNumerics) -> int:
    """Bytes of a quantized package's weights; embeddings, head and norms stay in floating point."""
    element = FLOAT_TYPES[numerics].itemsize
    outer = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2) + shape.hidden_size
    total = element * outer
    for width, scheme in zip(subnet.widths, schemes(subnet, numerics), strict=True):
        matrices = (*shape.attention_matrices(), *shape.mlp_matrices(width))
        total += sum(matrix_bytes(scheme, n, k) for n, k in matrices) + element * shape.layer_vectors(width)
    return total


def quantization_config(
    subnet: SubNetwork, numerics: VllmNumerics, symmetric: bool = False
) -> dict[str, Any] | None:
    """What ``config.json`` says of the package's matrices; None where none is quantized.

    Layers of one scheme are a group of it, named by their numbers where there are several. ``symmetric``
    activations are for GPUs: vLLM's product of asymmetric ones is CUTLASS's alone, which takes sizes that
    are multiples of 16 and has no fallback. On a CPU with AMX asymmetric ones take vLLM to oneDNN's kernel,
    whose error was a third of the other's, and oneDNN is what every other CPU runs in any case.
    """
    layers = schemes(subnet, numerics)
    used = sorted(set(layers) - {"float"})
    if not used:
        return None
    groups = {}
    for number, scheme in enumerate(used):
        mine = [str(layer) for layer, of in enumerate(layers) if of == scheme]
        targets = ["Linear"] if len(used) == 1 else [rf"re:.*layers\.({'|'.join(mine)})\..*"]
        groups[f"group_{number}"] = {**_group(scheme, symmetric), "targets": targets}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[used[0]] if len(used) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def _group(scheme: Scheme, symmetric: bool) -> dict[str, Any]:
    kind = "float" if scheme == "fp8" else "int"
    bits = 4 if scheme == "int4" else 8
    strategy: dict[str, Any] = {"strategy": "channel"}
    if scheme == "int4":
        strategy = {"strategy": "group", "group_size": GROUP}
    weights = {"num_bits": bits, "type": kind, "symmetric": True, **strategy, "dynamic": False}
    exact = symmetric or scheme == "fp8"
    activations = {"num_bits": 8, "type": kind, "symmetric": exact, "strategy": "token", "dynamic": True}
    return {
        "format": FORMATS[scheme],
        "weights": weights,
        "input_activations": None if scheme == "int4" else activations,
        "output_activations": None,
    }
