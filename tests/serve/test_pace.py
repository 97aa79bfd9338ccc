"""Prompts are read in chunks that slow a stream but do not stall it; events travel once a turn."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.mailbox import Mailbox
from serve.pace import CHUNK_TOKENS, MIN_TOKENS, Pace
from serve.sequence import Piece

STEP = 0.008


def read_prompt(pace: Pace, tokens: int, fixed: float, each: float, attention: float) -> list[float]:
    """Times of the chunks that a prompt is read in while one stream decodes."""
    done, times = 0, []
    while done < tokens:
        pace.decoded(STEP)
        size = min(pace.chunk(1, 1), tokens - done)
        times.append(fixed + size * (each + attention * done))
        pace.read(size, times[-1], 1, 1)
        done += size
    return times


@pytest.mark.parametrize("attention", [0.0, 4e-7])
def test_a_stream_beside_a_long_prompt_keeps_within_thrice_its_step(attention):
    times = sorted(read_prompt(Pace(), 4000, fixed=0.004, each=0.0005, attention=attention))
    assert STEP + times[int(0.99 * (len(times) - 1))] < 3 * STEP
    assert times[len(times) // 2] > 0.8 * STEP


def test_chunks_grow_where_the_machine_is_fast_and_stay_whole_where_nobody_waits():
    fast = Pace()
    read_prompt(fast, 8000, fixed=0.0001, each=0.00002, attention=0.0)
    assert fast.chunk(1, 1) > 300
    assert Pace().chunk(0, 3) == CHUNK_TOKENS


def test_a_hopeless_machine_still_reads():
    slow = Pace()
    for _ in range(50):
        slow.decoded(STEP)
        slow.read(slow.chunk(1, 1), 1.0, 1, 1)
    assert slow.chunk(1, 1) == MIN_TOKENS


def test_prompts_get_more_time_where_more_wait_for_them():
    pace = Pace()
    pace.decoded(STEP)
    assert pace.chunk(1, 7) == 7 * pace.chunk(1, 1) == 7 * pace.chunk(4, 2)


def test_the_short_rest_of_a_prompt_says_nothing_about_whole_chunks():
    pace = Pace()
    pace.decoded(STEP)
    before = pace.chunk(1, 1)
    pace.read(1, 0.001, 1, 1)
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
