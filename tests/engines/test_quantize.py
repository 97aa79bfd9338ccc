"""Block quantization: layout, exactness where it is exact, and error bounds where it is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.engines.quantize import dequantize, quantize
from compressor.space import QUANT_BLOCK


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 100), bits=st.sampled_from([8, 4]), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_no_weight_moves_further_than_its_step_allows(rows: int, columns: int, bits: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    integers, scales = quantize(weight, bits)
    block = QUANT_BLOCK[bits]
    blocks = -(-columns // block)
    assert integers.shape == (rows, blocks, block * bits // 8) and integers.dtype == torch.uint8
    assert scales.shape == (rows, blocks) and scales.dtype == torch.float16
    error = (dequantize(integers, scales, bits)[:, :columns] - weight).abs()
    step = scales.float().abs().repeat_interleave(block, dim=1)[:, :columns]
    # the positive end of the 4-bit grid is clipped by up to a step
    assert (error <= step * (0.501 if bits == 8 else 1.001)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_on_the_grid_are_kept_exactly(bits: int) -> None:
    extreme = 2 ** (bits - 1) - 1
    integers = torch.randint(-extreme, extreme + 1, (4, 64)).float()
    integers[:, ::32] = -extreme if bits == 8 else -8
    weight = integers * 0.25
    assert torch.equal(dequantize(*quantize(weight, bits), bits), weight)


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    assert torch.equal(dequantize(*quantize(weight, 4), 4), weight)


def test_four_bits_pack_the_first_weight_into_the_low_nibble() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1] = -8.0, 3.0
    integers, scales = quantize(weight, 4)
    assert scales.item() == 1.0
    assert int(integers[0, 0, 0]) == (8 - 8) | (8 + 3) << 4
