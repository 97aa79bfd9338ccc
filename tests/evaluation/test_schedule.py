"""How a packing's trees are cut into forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import compressor.evaluation.schedule as schedule_module
from compressor.evaluation.encoding import Encoded
from compressor.evaluation.packing import Packing, pack
from compressor.evaluation.schedule import BLOCK_BYTES, Step, schedule


def apart(lengths: list[int]) -> Packing:
    """Sequences that share nothing, each a tree of its own."""
    return pack([Encoded(tuple(range(100 * i, 100 * i + n + 1)), 2) for i, n in enumerate(lengths)])


def passes(packing: Packing, workers: int, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    monkeypatch.setattr(schedule_module, "most_workers", lambda: workers)
    return schedule(packing, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_blocks_are_even_and_as_many_for_each_thread(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(20, 60, 120).tolist()
    packing = apart(lengths)
    steps = passes(packing, workers, monkeypatch)
    sizes = [len(step.ids) for step in steps]
    assert sum(sizes) == packing.tokens == sum(lengths)
    assert len(sizes) % workers == 0
    assert max(sizes) - min(sizes) <= 2 * max(lengths)
    assert max(sizes) <= BLOCK_BYTES["cpu"] // torch.float32.itemsize + max(lengths)
    rows = torch.cat([step.rows for step in steps])
    assert torch.equal(rows.sort().values, torch.arange(packing.num_rows))


def test_few_tokens_are_not_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(passes(apart([30] * 8), 2, monkeypatch)) == 1
    assert len(passes(apart([30] * 20), 2, monkeypatch)) == 2


def test_a_sequence_longer_than_a_block_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [len(step.ids) for step in passes(apart([90] * 4 + [3000]), 1, monkeypatch)]
    assert sum(sizes) == 3360 and max(sizes) >= 3000


@pytest.mark.parametrize(
    ("tokens", "keys"), [(1, 1), (5, 32), (27, 32), (32, 32), (36, 36), (37, 64), (96, 96), (97, 128)]
)
def test_on_a_cpu_rows_of_scores_end_at_whole_vectors(tokens: int, keys: int) -> None:
    (step,) = schedule(apart([tokens]), torch.device("cpu"), torch.bfloat16)
    (call,) = step.calls
    mask = call.mask(call.full, torch.bfloat16)
    assert call.keys.length == keys and mask.shape == (1, tokens, keys)
    seen = torch.ones(tokens, keys, dtype=torch.bool).tril()
    assert torch.equal(mask[0] == 0, seen)
