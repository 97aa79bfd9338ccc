"""The measurement that decides between bf16 and fp32 on a CPU."""

import pytest
import torch

from compressor import compute


def test_this_machine_has_a_speed_for_both_and_the_choice_follows_it() -> None:
    speeds = compute.cpu_matmul_flops()
    assert set(speeds) == {torch.bfloat16, torch.float32}
    assert all(speed > 1e8 for speed in speeds.values())
    assert compute.fastest_cpu_dtype() is compute.faster_of(speeds)


def test_a_products_speed_counts_its_operations() -> None:
    assert 1e8 < compute.product_flops(torch.device("cpu"), torch.float32, 256) < 1e14


def test_it_is_measured_once_a_process() -> None:
    assert compute.cpu_matmul_flops() is compute.cpu_matmul_flops()


@pytest.mark.parametrize(
    ("bf16", "fp32", "chosen"),
    [
        (0.2e12, 0.39e12, torch.float32),
        (2.4e12, 0.4e12, torch.bfloat16),
        (0.40e12, 0.42e12, torch.bfloat16),
    ],
)
def test_bf16_stays_unless_fp32_is_clearly_faster(bf16: float, fp32: float, chosen: torch.dtype) -> None:
    assert compute.faster_of({torch.bfloat16: bf16, torch.float32: fp32}) is chosen
