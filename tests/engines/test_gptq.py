"""Rounding by what inputs are like: better than the nearest on them, and whole where they tell nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.engines.gptq import output_error, round_matrix
from compressor.engines.quantize import quantize


def problem(columns: int = 96, rows: int = 40) -> tuple[Tensor, Tensor]:
    """A matrix, and second moments of inputs that lie near a few directions."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(600, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    inputs += 0.1 * torch.randn(600, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [96, 64, 70])
def test_outputs_keep_closer_than_by_rounding_to_the_nearest(bits: int, columns: int) -> None:
    weight, moments = problem(columns)
    nearest, plain, refined = (
        output_error(weight, matrix.values(columns), moments)
        for matrix in (
            quantize(weight, bits),
            round_matrix(weight, moments, bits, refine=False),
            round_matrix(weight, moments, bits),
        )
    )
    assert plain < 0.7 * nearest
    assert refined <= 1.001 * plain


def test_a_prefix_is_what_rounding_passed_on_to_it_alone() -> None:
    """Columns beyond a prefix never change it, so that one rounding serves every width."""
    weight, moments = problem()
    changed = weight.clone()
    changed[:, 64:] = torch.randn(len(weight), 32, generator=torch.Generator().manual_seed(4))
    whole, other = (round_matrix(each, moments, 4, refine=False).values(96) for each in (weight, changed))
    assert torch.equal(whole[:, :64], other[:, :64])
    assert not torch.equal(whole[:, 64:], other[:, 64:])


@pytest.mark.parametrize("dead", [slice(0, 96), slice(10, 40)], ids=["all", "some"])
def test_inputs_that_never_differ_from_zero_round_to_the_nearest(dead: slice) -> None:
    weight, moments = problem()
    moments[dead] = 0
    moments[:, dead] = 0
    found = round_matrix(weight, moments, 4).values(96)
    assert torch.isfinite(found).all()
    nearest = quantize(weight, 4).values(96)
    assert (found - weight)[:, dead].abs().mean() < 1.5 * (nearest - weight)[:, dead].abs().mean()


def test_moments_that_are_singular_or_broken_do_no_harm() -> None:
    weight, _ = problem()
    line = torch.ones(96, 96)
    for moments in (line, line * torch.inf, torch.full((96, 96), torch.nan), line * 0, -line):
        found = round_matrix(weight, moments, 4).values(96)
        assert (found - weight).abs().max() < 2
