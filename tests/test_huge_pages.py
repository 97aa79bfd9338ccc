"""What is allocated in the block lies on huge pages after it, unchanged."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from compressor import huge_pages
from compressor.huge_pages import on_huge_pages

SIZE = 64 << 20

needs_huge_pages = pytest.mark.skipif(not huge_pages._page_size(), reason="this system has no huge pages")


def _zeros() -> np.ndarray:
    """Memory that nobody has asked huge pages for, as numpy does for its own."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, SIZE, flags=flags), np.uint8)


def _on_huge_pages() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@needs_huge_pages
def test_what_is_allocated_within_moves_and_stays_as_it_is() -> None:
    before = _on_huge_pages()
    with on_huge_pages():
        numbers = _zeros()
        numbers[:] = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
        expected = int(numbers.sum(dtype=np.int64))
    if _on_huge_pages() == before:
        pytest.skip("this kernel gives no huge pages when asked")
    assert _on_huge_pages() - before > SIZE // 2
    assert int(numbers.sum(dtype=np.int64)) == expected


@needs_huge_pages
def test_memory_held_before_stays_where_it_is() -> None:
    earlier = _zeros()
    earlier[:] = 1
    before = _on_huge_pages()
    with on_huge_pages():
        pass
    assert abs(_on_huge_pages() - before) < SIZE // 4
    assert earlier.all()


def test_memory_that_is_hardly_used_is_not_taken_whole() -> None:
    size = huge_pages._page_size() or 2 << 20
    with on_huge_pages():
        sparse = _zeros()
        sparse[:: SIZE // 8] = 1
    start = sparse.ctypes.data
    taken = [block for block in huge_pages._blocks_in_use(size) if start <= block < start + SIZE - size]
    assert len(taken) <= 1


@pytest.mark.parametrize("settings", ["always madvise [never]", None])
def test_where_they_are_forbidden_or_unknown_nothing_is_done(tmp_path, monkeypatch, settings) -> None:
    if settings:
        (tmp_path / "enabled").write_text(settings)
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "_collapse", None)
    with on_huge_pages():
        held = _zeros()
        held[:] = 1
    assert held.all()
