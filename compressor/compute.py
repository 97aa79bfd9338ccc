"""In which numerics this machine multiplies matrices fastest, found by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache

import torch

DTYPES = (torch.bfloat16, torch.float32)
"""What weights stored in bf16 can be computed in without losing anything."""
MARGIN = 1.25
"""How much faster fp32 must be than bf16 to be worth its twice as large weights."""
ROWS, COLUMNS = 1024, 1024
"""The measured product is [ROWS, COLUMNS] by [COLUMNS, COLUMNS]: a layer of a small model."""
REPEATS = 8


def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16, or float32 where this CPU multiplies it clearly faster.

    bf16 is fast where the CPU has matrix units for it (AMX, SVE) and slow where it only converts. A model
    stored in bf16 and computed in fp32 gives the same function with less rounding.
    """
    return faster_of(cpu_matmul_flops())


def faster_of(speeds: Mapping[torch.dtype, float]) -> torch.dtype:
    """float32 where its speed is clearly the higher one, else bfloat16."""
    return torch.float32 if speeds[torch.float32] > MARGIN * speeds[torch.bfloat16] else torch.bfloat16


@cache
def gpu_matmul_flops() -> float:
    """Floating-point operations a second of a large product in bf16 on the GPU that torch uses."""
    return product_flops(torch.device("cuda"), torch.bfloat16)


def product_flops(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """Floating-point operations a second of square matrices' product; the best of a few repeats."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(REPEATS):
        _finish(device)
        started = time.perf_counter()
        matrix @ matrix
        _finish(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def cpu_matmul_flops() -> Mapping[torch.dtype, float]:
    """Floating-point operations a second of a linear layer, by dtype, with torch's threads as they are.

    The best of a few repeats, taken in turns so that other load meets both alike; about 0.1 s, once a
    process.
    """
    pairs = {dtype: _operands(dtype) for dtype in DTYPES}
    best = dict.fromkeys(DTYPES, float("inf"))
    with torch.inference_mode():
        for inputs, weight in pairs.values():
            torch.nn.functional.linear(inputs, weight)
        for _ in range(REPEATS):
            for dtype, (inputs, weight) in pairs.items():
                started = time.perf_counter()
                torch.nn.functional.linear(inputs, weight)
                best[dtype] = min(best[dtype], time.perf_counter() - started)
    return {dtype: 2.0 * ROWS * COLUMNS**2 / seconds for dtype, seconds in best.items()}


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(n, COLUMNS, generator=generator) for n in (ROWS, COLUMNS))
    return inputs.to(dtype), weight.to(dtype)
