"""Freed memory stays within the block and goes back after it."""

from __future__ import annotations

import resource
import sys

import psutil
import pytest

from compressor.heap import freed_memory_kept

SIZE = 64 << 20
SMALLEST_PAGES = 1000
"""Fewer than a buffer's 16,384 pages of 4 KiB, more than what Python itself touches meanwhile."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")


def _faults_of_a_buffer() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * SIZE
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_buffers_are_used_again_within_the_block_and_given_back_after_it() -> None:
    process = psutil.Process()
    with freed_memory_kept():
        _faults_of_a_buffer()
        assert _faults_of_a_buffer() < SMALLEST_PAGES
        kept = process.memory_info().rss
    assert process.memory_info().rss < kept - SIZE // 2


def test_an_error_within_the_block_gives_memory_back_too() -> None:
    process = psutil.Process()
    with pytest.raises(RuntimeError), freed_memory_kept():
        _faults_of_a_buffer()
        kept = process.memory_info().rss
        raise RuntimeError
    assert process.memory_info().rss < kept - SIZE // 2
