"""What glibc does with freed memory; nothing is changed where another allocator is in use."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of ``mallopt`` (malloc.h)."""
_USUAL = {_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""The defaults, as glibc itself adapts them once large buffers were freed."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Freed buffers, however large, are used again within the block; they go back to the system after it.

    By default each large buffer is mapped anew, and the page faults of fresh memory took an eighth
    of a training step on a CPU.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            mallopt(parameter, value)
        give_back_freed()


def give_back_freed() -> None:
    """Let glibc return freed memory, which a later allocation would otherwise take without a trace."""
    if (trim := _function("malloc_trim")) is not None:
        trim(0)


def _function(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
