"""Block-wise symmetric weight quantization, in the layout of ONNX Runtime's MatMulNBits.

A row of K weights is cut into blocks of ``QUANT_BLOCK[bits]``; each block has one fp16 scale and
integers around the implicit zero point 2^(bits-1). Layout: ONNX Runtime contrib operator MatMulNBits.
"""

from __future__ import annotations

import torch

from compressor.space import QUANT_BLOCK

CHUNK_ROWS = 4096
"""Rows quantized at once, so that a large vocabulary takes no large temporaries."""


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix of shape [N, K].

    Returns the integers, uint8 [N, blocks, block * bits / 8] (low nibble first), and the scales,
    fp16 [N, blocks]. K is padded with zeros to whole blocks.
    """
    integers, scales = zip(
        *(_quantize_rows(rows, bits) for rows in torch.split(weight, CHUNK_ROWS)), strict=True
    )
    return torch.cat(integers), torch.cat(scales)


def dequantize(integers: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The fp32 matrix [N, blocks * block] that the integers and scales stand for."""
    if bits == 4:
        integers = torch.stack((integers & 15, integers >> 4), dim=-1).flatten(-2)
    values: torch.Tensor = (integers.float() - 2 ** (bits - 1)) * scales.float().unsqueeze(-1)
    return values.flatten(-2)


def _quantize_rows(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = _blocked(weight, QUANT_BLOCK[bits])
    scales = _stored(_scales_8(blocks) if bits == 8 else _scales_4(blocks))
    integers = _integers(blocks, scales.float(), bits)
    return (integers if bits == 8 else _pack_nibbles(integers)), scales


def _blocked(weight: torch.Tensor, block: int) -> torch.Tensor:
    rows, columns = weight.shape
    padding = -columns % block
    padded = torch.nn.functional.pad(weight.float(), (0, padding)) if padding else weight.float()
    return padded.reshape(rows, -1, block)


def _scales_8(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax(dim=-1) / 127


def _scales_4(blocks: torch.Tensor) -> torch.Tensor:
    """The extreme value of a block maps to -8, which has no positive twin.

    Choosing scales of least squared error instead made the starter worse: wikitext-2 NLL 3.64
    against 3.53 (bf16: 3.32), for it shrinks the outliers that matter.
    """
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    return torch.where(high > -low, high, low) / -8


def _integers(blocks: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    zero = 2 ** (bits - 1)
    scaled = (blocks / scales.unsqueeze(-1)).round_().add_(zero)
    return scaled.clamp_(0, 2 * zero - 1).to(torch.uint8)


def _pack_nibbles(integers: torch.Tensor) -> torch.Tensor:
    return integers[..., 0::2] | (integers[..., 1::2] << 4)


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored; a block too small for fp16 (below 4e-6) is one of zeros, of scale 1."""
    half = scales.half()
    return torch.where(half == 0, torch.ones_like(half), half)
