"""Pieces of work side by side: all are done, what goes wrong is told, and torch's threads are as before."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from compressor.evaluation.workers import MOST_WORKERS, side_by_side


@pytest.fixture(params=[1, 2, 9])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_piece_is_done_once_by_threads_that_share_the_cores(threads: int) -> None:
    done: list[int] = []
    shares = set()

    def work(piece: int) -> None:
        time.sleep(0.01)
        shares.add((threading.get_ident(), torch.get_num_threads()))
        done.append(piece)

    side_by_side(work, range(20))
    assert sorted(done) == list(range(20))
    workers = min(MOST_WORKERS, threads)
    assert len(shares) == workers
    assert {share for _, share in shares} == {threads // workers}
    assert torch.get_num_threads() == threads


def test_an_error_is_told_and_what_has_not_begun_is_left(threads: int) -> None:
    begun: list[int] = []

    def work(piece: int) -> None:
        begun.append(piece)
        time.sleep(0.01)
        if piece == 3:
            raise ValueError("piece 3")

    with pytest.raises(ValueError, match="piece 3"):
        side_by_side(work, range(100))
    assert len(begun) < 50
    assert torch.get_num_threads() == threads


def test_workers_compute_as_their_caller_does() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    tracked: list[bool] = []
    with torch.inference_mode():
        side_by_side(lambda _: tracked.append((weight @ weight).requires_grad), range(4))
    side_by_side(lambda _: tracked.append((weight @ weight).requires_grad), range(4))
    assert tracked == [False] * 4 + [True] * 4
