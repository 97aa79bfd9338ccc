"""Block-wise weight quantization to the nearest, in the layout of ONNX Runtime's MatMulNBits.

A row of K weights is cut into blocks of ``QUANT_BLOCK[bits]``; each block has one fp16 scale and integers
around a zero point: 2^(bits-1) for all, or, for the bits in ``ZERO_POINTS``, the block's own. Layout: ONNX
Runtime contrib operators MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.space import QUANT_BLOCK, ZERO_POINTS

CHUNK_ROWS = 4096
"""Rows quantized at once, so that a large vocabulary takes no large temporaries."""
SHRINKS = tuple(1 - 0.03 * step for step in range(14))
"""Shares of a block's range that a grid is tried over: what lies beyond is clipped to its ends."""


@dataclass(frozen=True)
class Grid:
    """The values that a matrix [N, K] may take: a scale and a zero point (fp32, whole) for each block,
    both [N, blocks]. ``bits`` tell how many steps there are and how long a block is."""

    scales: Tensor
    zeros: Tensor
    bits: int

    @property
    def top(self) -> int:
        """The largest integer."""
        return int(2**self.bits - 1)

    def integers(self, weight: Tensor) -> Tensor:
        """The nearest integers to weights [N, K], fp32 [N, blocks, block]; K is padded with zeros."""
        blocks = blocked(weight, QUANT_BLOCK[self.bits])
        return (
            blocks.div(self.scales.unsqueeze(-1)).round_().add_(self.zeros.unsqueeze(-1)).clamp_(0, self.top)
        )

    def values(self, integers: Tensor, columns: int) -> Tensor:
        """What integers [N, blocks, block] stand for, fp32 [N, columns]."""
        steps = integers - self.zeros.unsqueeze(-1)
        return steps.mul_(self.scales.unsqueeze(-1)).flatten(-2)[:, :columns]

    def rounded(self, weight: Tensor) -> Tensor:
        """Weights [N, K] at the nearest values, fp32."""
        return self.values(self.integers(weight), weight.shape[1])

    def part(self, rows: int, columns: int) -> Grid:
        """That of the first rows and columns."""
        blocks = -(-columns // QUANT_BLOCK[self.bits])
        return Grid(self.scales[:rows, :blocks], self.zeros[:rows, :blocks], self.bits)

    def scaled(self, factors: Tensor) -> Grid:
        """With each scale times a factor [N, blocks], as fp16 holds it."""
        return Grid(stored(self.scales * factors), self.zeros, self.bits)


@dataclass(frozen=True)
class Quantized:
    """A matrix as a package holds it: ``integers`` uint8 [N, blocks, block * bits / 8], low bits first;
    ``scales`` fp16 [N, blocks]; ``zeros`` uint8 [N, ceil(blocks * bits / 8)] likewise, or None where every
    zero point is 2^(bits-1)."""

    integers: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    @property
    def grid(self) -> Grid:
        scales = self.scales.float()
        if self.zeros is None:
            return Grid(scales, torch.full_like(scales, 2 ** (self.bits - 1)), self.bits)
        return Grid(scales, _unpack(self.zeros, self.bits)[:, : scales.shape[1]].float(), self.bits)

    def unpacked(self) -> Tensor:
        """The integers, fp32 [N, blocks, block]."""
        return _unpack(self.integers, self.bits).float()

    def values(self, columns: int) -> Tensor:
        """The fp32 matrix [N, columns] that it stands for."""
        parts = []
        for first in range(0, len(self.scales), CHUNK_ROWS):
            rows = self.rows(first, first + CHUNK_ROWS)
            parts.append(rows.grid.values(rows.unpacked(), columns))
        return torch.cat(parts)

    def rows(self, first: int, last: int) -> Quantized:
        """Some of its rows, the same memory."""
        zeros = None if self.zeros is None else self.zeros[first:last]
        return Quantized(self.integers[first:last], self.scales[first:last], zeros, self.bits)

    @classmethod
    def stacked(cls, parts: list[Quantized]) -> Quantized:
        """Matrices of the same inputs, one below the other."""
        zeros = [part.zeros for part in parts if part.zeros is not None]
        return cls(
            torch.cat([part.integers for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(zeros) if zeros else None,
            parts[0].bits,
        )


def quantize(weight: Tensor, bits: int) -> Quantized:
    """A matrix [N, K] rounded to the nearest, with grids that fit each block's own values best."""
    parts = torch.split(weight, CHUNK_ROWS)
    return Quantized.stacked([_nearest(rows, bits) for rows in parts])


def pack(integers: Tensor, grid: Grid) -> Quantized:
    """Integers [N, blocks, block] of a grid as they are stored."""
    zeros = _pack(grid.zeros.to(torch.uint8), grid.bits) if grid.bits in ZERO_POINTS else None
    return Quantized(_pack(integers.to(torch.uint8), grid.bits), grid.scales.half(), zeros, grid.bits)


def blocked(weight: Tensor, block: int) -> Tensor:
    """A copy of weights [N, K] in fp32, [N, blocks, block], padded with zeros."""
    rows, columns = weight.shape
    padding = -columns % block
    wide = weight.float()
    padded = torch.nn.functional.pad(wide, (0, padding)) if padding else wide
    return padded.reshape(rows, -1, block)


def even_grid(blocks: Tensor, bits: int) -> Grid:
    """The grid around 0 over blocks [N, blocks, block]: their largest magnitude is the last step."""
    scales = stored(blocks.abs().amax(dim=-1) / (2 ** (bits - 1) - 1))
    return Grid(scales, torch.full_like(scales, 2 ** (bits - 1)), bits)


def fitted_grid(blocks: Tensor, bits: int, importance: Tensor | None = None) -> Grid:
    """The grid with zero points of least squared error over blocks [N, blocks, block].

    ``importance``, which broadcasts to the blocks, weighs errors. Tries ``SHRINKS`` of each block's range.
    """
    top = 2**bits - 1
    low, high = blocks.amin(dim=-1).clamp_(max=0), blocks.amax(dim=-1).clamp_(min=0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for share in SHRINKS:
        scales = stored((high - low) * (share / top))
        zeros = (low * -share / scales).round_().clamp_(0, top)
        found = blocks.div(scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1)).round_().clamp_(0, top)
        found.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).sub_(blocks).square_()
        error = (found if importance is None else found.mul_(importance)).sum(dim=-1)
        if best is None:
            best = error, scales, zeros
        else:
            better = error < best[0]
            best = tuple(  # type: ignore[assignment]
                torch.where(better, new, old) for new, old in zip((error, scales, zeros), best, strict=True)
            )
    assert best is not None
    return Grid(best[1], best[2], bits)


def stored(scales: Tensor) -> Tensor:
    """Scales as fp16 holds them; a block too small for it (below 4e-6) is one of zeros, of scale 1."""
    half = scales.half().float()
    return torch.where(half == 0, torch.ones_like(half), half)


def _nearest(weight: Tensor, bits: int) -> Quantized:
    blocks = blocked(weight, QUANT_BLOCK[bits])
    grid = fitted_grid(blocks, bits) if bits in ZERO_POINTS else even_grid(blocks, bits)
    return pack(grid.integers(weight), grid)


def _pack(integers: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] with ``8 // bits`` of them in a byte."""
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = torch.nn.functional.pad(integers, (0, 1))
    return integers[..., 0::2] | (integers[..., 1::2] << 4)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
