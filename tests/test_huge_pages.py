"""What is allocated in the block lies on huge pages after it, unchanged."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from compressor import huge_pages
from compressor.huge_pages import on_huge_pages

SIZE = 64 << 20

needs_huge_pages = pytest.mark.skipif(
    not (huge_pages._page_size() and Path("/proc/self/pagemap").exists()),
    reason="this system has no huge pages",
)


def _zeros() -> np.ndarray:
    """Memory that nobody has asked huge pages for, as numpy does for its own."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, SIZE, flags=flags), np.uint8)


def _on_huge_pages(array: np.ndarray) -> int:
    """Bytes on huge pages in the mappings that hold the array: what else the process holds may change."""
    start = array.ctypes.data
    total, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            low, high = (int(bound, 16) for bound in name.split("-"))
            within = low < start + array.nbytes and high > start
        elif within and name == "AnonHugePages:":
            total += 1024 * int(words[0])
    return total


@needs_huge_pages
def test_what_is_allocated_within_moves_and_stays_as_it_is() -> None:
    with on_huge_pages():
        numbers = _zeros()
        numbers[:] = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
        expected = int(numbers.sum(dtype=np.int64))
        before = _on_huge_pages(numbers)
    if _on_huge_pages(numbers) == before:
        pytest.skip("this kernel gives no huge pages when asked, or gives them unasked")
    assert _on_huge_pages(numbers) - before > SIZE // 2
    assert int(numbers.sum(dtype=np.int64)) == expected


@needs_huge_pages
def test_memory_held_before_stays_where_it_is(monkeypatch) -> None:
    earlier = _zeros()
    earlier[:] = 1
    asked: list[int] = []
    monkeypatch.setattr(huge_pages, "_collapse", lambda start, _: asked.append(start))
    with on_huge_pages():
        later = _zeros()
        later[:] = 1

    def among(array: np.ndarray) -> int:
        return sum(array.ctypes.data <= block < array.ctypes.data + SIZE for block in asked)

    assert not among(earlier)
    assert among(later) * huge_pages._page_size() > SIZE // 2


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
