"""How much of a prompt to read at a time, so that a long one slows a stream but never stalls it.

A chunk goes through the model's parts one by one, and streams may go on after each. A part's time has a
share that every chunk has (the weights are read once), one a token, and one that grows with what was
read before (attention). Rather than model it, the chunk's size is steered: each is as much larger or
smaller than the last as its parts' time was below or above what is allowed.
"""

from __future__ import annotations

import math

CHUNK_TOKENS = 512  # when nothing else runs
FIRST_TOKENS = 8
MIN_TOKENS = 2  # a lone token is rounded differently, see rows.py
ROWS_AT_A_TIME = 16  # of attention, or a multiple that depends on heads; one over is rounded as if alone
GAP = 1.7  # times its usual step may a stream wait for its next token
LEAST = 0.15  # of a step's time goes to reading at least, where steps have become slow themselves
SMOOTHING = 0.2
GROWTH = 1.5
TOGETHER_SECONDS = 1.0  # between a stream's first two tokens, if prompts that came with it are read meanwhile


class Pace:
    """Learns what steps and parts cost on this machine, with this model."""

    def __init__(self) -> None:
        self.decode_seconds = 0.0
        self._usual: dict[int, float] = {}  # by the number of sequences, of steps with no reading between
        self._size = float(FIRST_TOKENS)
        self._token_seconds = 0.0  # of reading where nobody waits

    def decoded(self, seconds: float, decoding: int, reading: bool) -> None:
        """A decoding step of so many sequences took so long."""
        self.decode_seconds = _smoothed(self.decode_seconds, seconds)
        if not reading:
            self._usual[decoding] = _smoothed(self._usual.get(decoding, 0.0), seconds)

    def allowed_seconds(self, decoding: int, prefilling: int) -> float:
        """How long to read while ``decoding`` sequences wait; longer, the more others gain by it.

        Steps take longer beside a prompt than alone (it takes their place in the processor's caches), and
        what counts for a stream is how its tokens came before.
        """
        if not decoding:
            return math.inf
        step = self.decode_seconds
        rest = GAP * self._usual.get(decoding, step) - step
        return max(rest, LEAST * step) * _share(decoding, prefilling)

    def worth_waiting(self, waited: float, tokens: int) -> bool:
        """Whether streams that have waited so long since their first token should wait until ``tokens`` more
        of others' prompts are read: prompts read whole and streams that go on together take fewer passes."""
        return waited + tokens * self._token_seconds <= TOGETHER_SECONDS

    def chunk(self, decoding: int, prefilling: int) -> int:
        """Tokens to read at a time while ``decoding`` sequences wait."""
        if not decoding:
            return CHUNK_TOKENS
        return min(CHUNK_TOKENS, int(self._size * _share(decoding, prefilling)))

    def read(self, tokens: int, seconds: float, decoding: int, prefilling: int, parts: int) -> None:
        """One of ``parts`` took so long for a chunk of ``tokens`` while ``decoding`` sequences waited."""
        if not decoding:
            self._token_seconds = _smoothed(self._token_seconds, seconds * parts / tokens)
        if not (decoding and self.decode_seconds):
            return
        share = _share(decoding, prefilling)
        factor = self.allowed_seconds(decoding, prefilling) / seconds
        if factor > 1 and tokens < int(self._size * share):
            return  # the rest of a prompt was short: that says nothing about a whole chunk
        size = tokens / share * min(max(factor, 1 / GROWTH), GROWTH)
        self._size = min(max(size, MIN_TOKENS), CHUNK_TOKENS)


def steady_size(size: int, left: int) -> int:
    """Near ``size``, how many of a prompt's ``left`` tokens to read so that no token's rounding depends on
    how the prompt is split: none is left alone, at its chunk's end or in the chunk that follows."""
    size = min(size, left)
    if size > 1 and left - size == 1:
        size += 1
    if size > 1 and size % ROWS_AT_A_TIME == 1:
        size -= 2 if size == left else 1
    return size


def _smoothed(old: float, new: float) -> float:
    """A disturbance makes a step longer, never shorter: what is short is believed at once."""
    return min(old + SMOOTHING * (new - old), new) if old else new


def _share(decoding: int, prefilling: int) -> float:
    """Where more sequences wait for their first token than for their next, prompts get more of the time."""
    return max(1.0, prefilling / decoding)
