"""What a CPU computes with."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

OF_INTEREST = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),  # x86-64
    *("asimddp", "i8mm", "bf16", "sve"),  # ARM
)
CPUINFO = Path("/proc/cpuinfo")


def instructions(cpuinfo: str) -> tuple[str, ...]:
    """The instruction sets of interest, from what Linux says of the CPU."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    return tuple(flag for flag in OF_INTEREST if flag in flags)


def saturates(isa: Collection[str]) -> bool:
    """Whether sums of products of bytes overflow: on x86 without VNNI two are added in 16 bits.

    ONNX Runtime's kernels avoid it; oneDNN's, which vLLM runs INT8 with, do not.
    """
    return "avx2" in isa and not {"avx_vnni", "avx512_vnni"} & set(isa)


def this_saturates() -> bool:
    """Whether this machine's CPU does; False where it can't be told."""
    try:
        return saturates(instructions(CPUINFO.read_text(encoding="utf-8")))
    except OSError:
        return False
