"""Prompts are read in chunks that slow a stream but do not stall it; events travel once a turn."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from serve.mailbox import Mailbox
from serve.pace import CHUNK_TOKENS, MIN_TOKENS, ROWS_AT_A_TIME, Pace, steady_size
from serve.sequence import Piece

STEP = 0.008
PARTS = 10


def read_prompt(
    pace: Pace, tokens: int, fixed: float, each: float, attention: float, slower: float = 1.0
) -> list[float]:
    """Gaps between a stream's tokens while a prompt is read, a part a turn; steps become ``slower``."""
    pace.decoded(STEP, 1, False)
    done, gaps = 0, []
    while done < tokens:
        size = min(pace.chunk(1, 1), tokens - done)
        for _ in range(PARTS):
            pace.decoded(STEP * slower, 1, True)
            seconds = fixed + size * (each + attention * done)
            gaps.append(STEP * slower + seconds)
            pace.read(size, seconds, 1, 1, PARTS)
        done += size
    return gaps


@pytest.mark.parametrize("attention", [0.0, 4e-8])
@pytest.mark.parametrize("slower", [1.0, 1.5])
def test_a_stream_beside_a_long_prompt_keeps_within_thrice_its_step(attention, slower):
    gaps = read_prompt(Pace(), 4000, fixed=0.0004, each=0.00005, attention=attention, slower=slower)
    assert sorted(gaps)[int(0.99 * (len(gaps) - 1))] < 3 * STEP
    assert sorted(gaps)[len(gaps) // 2] > 1.5 * STEP


def test_chunks_grow_where_the_machine_is_fast_and_stay_whole_where_nobody_waits():
    fast = Pace()
    read_prompt(fast, 8000, fixed=0.0001, each=0.00002, attention=0.0)
    assert fast.chunk(1, 1) > 200
    assert Pace().chunk(0, 3) == CHUNK_TOKENS
    assert Pace().allowed_seconds(0, 3) == math.inf


def test_a_hopeless_machine_still_reads():
    slow = Pace()
    for _ in range(50):
        slow.decoded(STEP, 1, False)
        slow.read(slow.chunk(1, 1), 1.0, 1, 1, PARTS)
    assert slow.chunk(1, 1) == MIN_TOKENS
    slow.decoded(100 * STEP, 1, True)
    assert slow.allowed_seconds(1, 1) > 0


def test_prompts_get_more_time_where_more_wait_for_them():
    pace = Pace()
    pace.decoded(STEP, 1, False)
    assert pace.chunk(1, 7) == 7 * pace.chunk(1, 1) == 7 * pace.chunk(4, 2)
    assert pace.allowed_seconds(1, 7) == pytest.approx(7 * pace.allowed_seconds(1, 1))


def test_streams_that_have_only_begun_wait_for_prompts_that_are_soon_read():
    pace = Pace()
    pace.read(100, 0.1 / PARTS, 0, 1, PARTS)
    assert pace.worth_waiting(0.0, 900) and pace.worth_waiting(0.5, 400)
    assert not pace.worth_waiting(0.0, 1100) and not pace.worth_waiting(0.5, 600)


def test_the_short_rest_of_a_prompt_says_nothing_about_whole_chunks():
    pace = Pace()
    pace.decoded(STEP, 1, False)
    before = pace.chunk(1, 1)
    pace.read(1, 0.001, 1, 1, PARTS)
    assert pace.chunk(1, 1) == before


def test_events_wait_for_the_end_of_the_turn_and_keep_their_order():
    async def main() -> list[tuple[int, str]]:
        mailbox, arrived = Mailbox(), asyncio.Queue()
        sinks = [mailbox.sink(arrived.put_nowait, index) for index in range(2)]

        def turn() -> None:
            for text in "abc":
                for sink in sinks:
                    sink(Piece(text))
            assert arrived.empty()
            mailbox.send()

        thread = threading.Thread(target=turn)
        thread.start()
        events = [await asyncio.wait_for(arrived.get(), 10) for _ in range(6)]
        thread.join()
        return [(index, event.text) for index, event in events]

    assert asyncio.run(main()) == [(0, "a"), (1, "a"), (0, "b"), (1, "b"), (0, "c"), (1, "c")]


@pytest.mark.parametrize("size", [2, 3, 64, 127, 128, 129, 256, 257, 511, 512])
def test_no_chunk_leaves_a_token_to_be_rounded_alone(size):
    for prompt in range(2, 1200):
        left = prompt
        while left:
            taken = steady_size(size, left)
            assert 0 < taken <= min(left, size + 1) and taken % ROWS_AT_A_TIME != 1, (prompt, left)
            left -= taken
    assert steady_size(size, 1) == 1
