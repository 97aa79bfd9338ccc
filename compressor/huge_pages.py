"""Weights on huge pages: what every decoding step reads whole is found with fewer address translations.

Linux gives a process's memory huge pages by itself only where the machine is set up so; most ask for them
to be requested, which ONNX Runtime does not. Nothing is done on other systems, or where they are forbidden.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.heap import give_back_freed

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_ADVISE, _COLLAPSE = 14, 25
"""Advice for ``madvise`` (linux/mman.h): when there is time; now, from Linux 6.1 on."""
_LARGEST = 32 << 20
"""Where a huge page is larger than this, as on some ARM kernels, weights do not fill any."""
_FULL = 0.9
"""Of a huge page's memory, what must be in use for it to be worth taking whole."""
_ENTRY = 8
_IN_MEMORY = 0x80
"""Bytes of a page in ``/proc/self/pagemap``, and the bit of the last that says it is resident."""


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Move what is allocated within the block, and still held at its end, to huge pages."""
    size = _page_size()
    before: set[int] = set()
    if size:
        give_back_freed()  # else memory that is held already would be allocated again
        before.update(_blocks_in_use(size))
    yield
    if size:
        for start in _blocks_in_use(size):
            if start not in before:
                _collapse(start, size)


def _page_size() -> int:
    """Bytes of a huge page; 0 where there are none to be had."""
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        size = int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return size if size <= _LARGEST else 0


def _blocks_in_use(size: int) -> list[int]:
    """Addresses of blocks of that size, aligned to it, of this process's own memory that is in use."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = []
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
            for start, end in _own_memory():
                for block in range(-(-start // size) * size, end - size + 1, size):
                    pages.seek(block // page * _ENTRY)
                    flags = pages.read(size // page * _ENTRY)[_ENTRY - 1 :: _ENTRY]
                    resident = sum(flag >= _IN_MEMORY for flag in flags)
                    if resident >= _FULL * size / page:
                        found.append(block)
    except OSError:
        return []
    return found


def _own_memory() -> list[tuple[int, int]]:
    """Private, writable mappings of no file: what ``malloc`` gives."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            found.append((start, end))
    return found


def _collapse(start: int, size: int) -> None:
    """Ask for one huge page; whether it is given makes no difference but to speed."""
    madvise = ctypes.CDLL(None).madvise
    block = ctypes.c_void_p(start), ctypes.c_size_t(size)
    if madvise(*block, _COLLAPSE):
        madvise(*block, _ADVISE)
