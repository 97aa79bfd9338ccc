"""Block quantization: layout, exactness where it is exact, and error bounds where it is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.engines.quantize import Grid, blocked, fitted_grid, pack, quantize
from compressor.space import QUANT_BLOCK


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 100), bits=st.sampled_from([8, 4]), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_no_weight_moves_further_than_its_step_allows(rows: int, columns: int, bits: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = quantize(weight, bits)
    block = QUANT_BLOCK[bits]
    blocks = -(-columns // block)
    assert found.integers.shape == (rows, blocks, block * bits // 8) and found.integers.dtype == torch.uint8
    assert found.scales.shape == (rows, blocks) and found.scales.dtype == torch.float16
    assert (found.zeros is None) == (bits == 8)
    if found.zeros is not None:
        assert found.zeros.shape == (rows, -(-blocks // 2)) and found.zeros.dtype == torch.uint8
    error = (found.values(columns) - weight).square()
    step = found.scales.float().abs().repeat_interleave(block, dim=1)[:, :columns]
    if bits == 8:
        assert (error.sqrt() <= step * 0.501).all()
    else:  # what is clipped at a grid's ends makes up for itself within the block
        top = fitted_grid(blocked(weight, block), 4).scales
        whole = (torch.relu(weight).amax() + torch.relu(-weight).amax()) / 15
        assert (error <= max(float(top.max()), float(whole)) ** 2 * 16).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_on_the_grid_are_kept_exactly(bits: int) -> None:
    extreme = 2 ** (bits - 1) - 1
    integers = torch.randint(-extreme, extreme + 1, (4, 64)).float()
    integers[:, ::32] = -extreme if bits == 8 else -8
    weight = integers * 0.25
    assert torch.equal(quantize(weight, bits).values(64), weight)


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    assert torch.equal(quantize(weight, 4).values(64), weight)


@given(columns=st.integers(1, 100), rows=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_what_is_packed_is_unpacked(columns: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-columns // 32)
    integers = torch.randint(16, (rows, blocks, 32), generator=generator).float()
    zeros = torch.randint(16, (rows, blocks), generator=generator).float()
    grid = Grid((torch.rand(rows, blocks, generator=generator) + 1).half().float(), zeros, 4)
    found = pack(integers, grid)
    assert torch.equal(found.unpacked(), integers)
    assert torch.equal(found.grid.zeros, zeros)
    assert torch.equal(found.values(columns), grid.values(integers, columns))


def test_four_bits_pack_the_first_weight_into_the_low_nibble() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1] = -8.0, 3.0
    weight[0, 2] = 7.0
    found = quantize(weight, 4)
    assert found.scales.item() == 1.0 and found.zeros is not None and int(found.zeros) == 8
    assert int(found.integers[0, 0, 0]) == (8 - 8) | (8 + 3) << 4
