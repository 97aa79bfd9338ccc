"""Which CPUs add products of bytes without overflow."""

from __future__ import annotations

import pytest

from compressor.cpu import instructions, saturates


@pytest.mark.parametrize(
    ("flags", "overflows"),
    [
        ("flags\t\t: fpu avx avx2 fma", True),
        ("flags\t\t: fpu avx2 avx512f", True),
        ("flags\t\t: avx2 avx_vnni", False),
        ("flags\t\t: avx2 avx512f avx512_vnni", False),
        ("Features\t: fp asimd asimddp i8mm", False),
        ("", False),
    ],
)
def test_x86_without_vnni_saturates(flags: str, overflows: bool) -> None:
    assert saturates(instructions(f"processor\t: 0\n{flags}\nbugs\t: none\n")) is overflows
