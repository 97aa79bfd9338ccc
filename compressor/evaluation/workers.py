"""Independent pieces of work on several CPU threads, each with cores of its own.

A matrix product that two threads share ends with the slower of them, and so does every small step
between two products. Work that falls into pieces anyway (forward passes over different trees, blocks of
logits) needs no such waiting: each thread takes the next piece when it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST_WORKERS = 8
"""More would wait for Python's lock; each gets its share of the threads instead."""

T = TypeVar("T")


def most_workers() -> int:
    """Pieces that are worked on at a time, if there are as many."""
    return min(MOST_WORKERS, torch.get_num_threads())


def side_by_side(work: Callable[[T], None], pieces: Sequence[T]) -> None:
    """Do ``work`` on every piece, several at a time, with torch's threads shared out among them.

    The pieces begin in order and must not depend on each other. What one raises is raised here, and
    pieces that haven't begun are left.
    """
    threads = torch.get_num_threads()
    workers = min(most_workers(), len(pieces))
    if workers < 2:
        for piece in pieces:
            work(piece)
        return
    inference = torch.is_inference_mode_enabled()

    def one(piece: T) -> None:
        with torch.inference_mode(inference):
            work(piece)

    pool = ThreadPoolExecutor(workers, "worker", lambda: torch.set_num_threads(threads // workers))
    try:
        for _ in pool.map(one, pieces):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' number holds for threads that are yet to be made
