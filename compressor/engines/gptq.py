"""Rounding a matrix so that its outputs keep close, by what its inputs are like.

GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and what each loses is
made up for by those that follow. Errors go from earlier to later columns alone, so where columns are sorted
by importance every prefix of the rounded matrix is one of the matrix's prefix rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.engines.quantize import Grid, Quantized, blocked, even_grid, fitted_grid, pack, stored
from compressor.space import QUANT_BLOCK, ZERO_POINTS

DAMPING = 0.01
"""Of the inputs' mean square, added to each one's: what few inputs say is not to be taken as sure."""
ROWS_AT_ONCE = 256
"""Rows whose scales are solved for at once, which takes their blocks' squares of memory."""


def round_matrix(weight: Tensor, moments: Tensor, bits: int, refine: bool = True) -> Quantized:
    """A matrix [N, K] in so many bits, given the second moments [K, K] of its inputs (any scale).

    ``refine``: once integers are found, scales are fitted to all of a row's errors together; not where
    prefixes of columns are to be used alone, since a scale then makes up for errors of later blocks.
    Inputs that never differ from 0 ("dead") round to the nearest, as all do where the moments are singular
    beyond damping.
    """
    moments = _damped(moments)
    factor = _passing(moments)
    if factor is None:
        moments = torch.diag(moments.diagonal())
        factor = torch.diag(moments.diagonal().rsqrt())
    integers, grid = _rounded(weight, factor, moments.diagonal(), bits)
    if refine:
        grid = _refined(weight, integers, grid, moments)
    return pack(integers, grid)


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """Mean square of what rounding adds to the outputs, as a share of theirs."""
    lost = rounded - weight
    return float(((lost @ moments) * lost).sum() / ((weight @ moments) * weight).sum())


def _damped(moments: Tensor) -> Tensor:
    """Moments in fp32 with something on every place of the diagonal."""
    found = moments.float().clone()
    diagonal = found.diagonal()
    level = float(diagonal.mean())
    if not level > 0 or not bool(torch.isfinite(found).all()):
        return torch.eye(len(found), device=found.device)
    diagonal[diagonal <= 0] = level
    diagonal += DAMPING * level
    return found


def _passing(moments: Tensor) -> Tensor | None:
    """The upper Cholesky factor [K, K] of the inverse moments; None where there is none."""
    wide = moments.double()
    lower, failed = torch.linalg.cholesky_ex(wide)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else upper.float()


def _rounded(weight: Tensor, factor: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Grid]:
    """Integers [N, blocks, block] and their grid, block by block, errors passed on to the right."""
    block, (rows, columns) = QUANT_BLOCK[bits], weight.shape
    left = weight.float().clone()
    scales, zeros, integers = [], [], []
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part = left[:, start:end]
        grid = _grid_of(part, importance[start:end], bits)
        found, errors = _pass_along(part, factor[start:end, start:end], grid)
        if end < columns:
            left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
        padding = block - (end - start)
        if padding:
            found = torch.cat((found, grid.zeros.expand(rows, padding)), dim=1)
        integers.append(found)
        scales.append(grid.scales)
        zeros.append(grid.zeros)
    return torch.stack(integers, dim=1), Grid(torch.cat(scales, dim=1), torch.cat(zeros, dim=1), bits)


def _grid_of(part: Tensor, importance: Tensor, bits: int) -> Grid:
    blocks = blocked(part, QUANT_BLOCK[bits])
    if bits not in ZERO_POINTS:
        return even_grid(blocks, bits)
    return fitted_grid(blocks, bits, blocked(importance[None], QUANT_BLOCK[bits]))


def _pass_along(part: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round the columns of a block [N, K] in their order; integers, and errors by the factor's diagonal.

    Columns lie in rows here: each is one stretch of memory.
    """
    columns = part.t().contiguous()
    found, errors = torch.empty_like(columns), torch.empty_like(columns)
    scales, zeros = grid.scales[:, 0], grid.zeros[:, 0]
    for column in range(len(columns)):
        values = columns[column]
        torch.div(values, scales, out=found[column]).round_().add_(zeros).clamp_(0, grid.top)
        kept = (found[column] - zeros).mul_(scales)
        torch.sub(values, kept, out=errors[column]).div_(factor[column, column])
        columns[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return found.t(), errors.t()


def _refined(weight: Tensor, integers: Tensor, grid: Grid, moments: Tensor) -> Grid:
    """The grid with the scales of least output error for these integers; a row keeps its own if better."""
    rows, blocks, block = integers.shape
    padding = blocks * block - weight.shape[1]
    if padding:
        moments = torch.nn.functional.pad(moments, (0, padding, 0, padding))
    by_block = moments.view(blocks, block, blocks * block)
    found = []
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        steps = integers[part] - grid.zeros[part].unsqueeze(-1)
        wanted = blocked(weight[part], block).flatten(-2)
        own = grid.scales[part]
        target = ((wanted @ moments).view_as(steps) * steps).sum(-1)
        crossed = torch.einsum("nbi,bik->nbk", steps, by_block).view(*steps.shape[:2], blocks, block)
        matrix = (crossed * steps.unsqueeze(1)).sum(-1)
        level = matrix.diagonal(dim1=1, dim2=2).mean(-1)
        eye = torch.eye(blocks, device=matrix.device)
        matrix += eye * (1e-4 * level + 1e-20)[:, None, None]
        solved, failed = torch.linalg.solve_ex(matrix, target)
        usable = (solved > 0) & torch.isfinite(solved) & (failed == 0)[:, None]
        solved = torch.where(usable & (steps.abs().sum(-1) > 0), stored(solved), own)
        losses = [
            ((lost @ moments) * lost).sum(-1)
            for lost in ((steps * scales.unsqueeze(-1)).flatten(-2) - wanted for scales in (solved, own))
        ]
        found.append(torch.where((losses[0] < losses[1])[:, None], solved, own))
    return Grid(torch.cat(found), grid.zeros, grid.bits)
