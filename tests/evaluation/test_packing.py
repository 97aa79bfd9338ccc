"""Packed trees hold every sequence, share prefixes, and let each token see its own past alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.evaluation.encoding import Encoded
from compressor.evaluation.packing import Costs, Packing, pack

sequences = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=12).map(tuple), min_size=1, max_size=25)


def read_back(packing: Packing, row: int) -> tuple[int, ...]:
    """The tokens that are visible from a score row, in order of position."""
    first = 0
    for tree in packing.trees:
        if row < first + len(tree.scored):
            offset = tree.scored[row - first]
            break
        first += len(tree.scored)
    seen: list[tuple[int, int]] = []
    while True:
        visible = np.flatnonzero(tree.mask()[offset])
        seen += zip(tree.positions[visible].tolist(), tree.ids[visible].tolist(), strict=True)
        if tree.parent < 0:
            break
        tree = packing.trees[tree.parent]
        offset = len(tree) - 1
    seen.sort()
    assert [position for position, _ in seen] == list(range(len(seen)))
    return tuple(token for _, token in seen)


@settings(max_examples=150, deadline=None)
@given(sequences)
def test_every_scored_token_sees_exactly_its_sequence(rows: list[tuple[int, ...]]) -> None:
    requests = [Encoded(ids, scored=1 + len(ids) // 3) for ids in rows]
    packing = pack(requests)
    for number, request in enumerate(requests):
        low, high = packing.request_starts[number : number + 2]
        assert tuple(packing.targets[low:high]) == request.ids[-request.scored :]
        for k in range(request.scored):
            past = request.ids[: len(request.ids) - request.scored + k]
            assert read_back(packing, int(packing.request_rows[low + k])) == past


def test_choices_share_their_context() -> None:
    context = tuple(range(100, 150))
    requests = [Encoded((*context, choice, 7, 8), scored=3) for choice in range(4)]
    packing = pack(requests)
    assert packing.tokens == 50 + 4 * 2
    assert packing.num_rows == 1 + 4 * 2


def test_a_few_shot_prefix_is_computed_once() -> None:
    shots = tuple(range(1000, 1600))
    requests = [Encoded((*shots, *range(item * 50, item * 50 + 40), 3), scored=1) for item in range(10)]
    packing = pack(requests)
    assert packing.prefixes == 1
    assert packing.tokens == 600 + 10 * 40


def test_single_token_choices_of_an_item_share_one_row() -> None:
    requests = [Encoded((5, 6, 7, choice), scored=1) for choice in range(4)]
    packing = pack(requests)
    assert (packing.tokens, packing.num_rows) == (3, 1)
    assert packing.targets.tolist() == [0, 1, 2, 3]


def test_a_prefix_is_kept_apart_only_where_that_costs_less() -> None:
    shots = tuple(range(1000, 1300))
    requests = [Encoded((*shots, *range(item * 200, item * 200 + 150), 3), scored=1) for item in range(8)]
    cheap, dear = pack(requests), pack(requests, Costs(prefix=10_000))
    assert (cheap.prefixes, cheap.tokens) == (1, 300 + 8 * 150)
    assert (dear.prefixes, dear.tokens) == (0, 8 * 450)


def test_a_short_prefix_is_not_kept_apart_where_its_keys_take_a_whole_step() -> None:
    requests = [Encoded((1, 2, *range(item * 100, item * 100 + 40), 3), scored=1) for item in range(100)]
    by_one, by_steps = pack(requests, Costs(key=0.003)), pack(requests, Costs(key=0.003, step=32))
    assert (by_one.prefixes, by_one.tokens) == (1, 2 + 100 * 40)
    assert (by_steps.prefixes, by_steps.tokens) == (0, 100 * 42)
