"""How much of a prompt to read at a time, so that a long one slows a stream but never stalls it.

A chunk's cost has a part that every chunk has (the weights are read once), one a token, and one that
grows with what was read before (attention). Rather than model it, the size is steered: each chunk is
as much larger or smaller than the last as its time was below or above what is allowed.
"""

from __future__ import annotations

CHUNK_TOKENS = 512  # when nothing else runs
FIRST_TOKENS = 8
MIN_TOKENS = 2  # a lone token is rounded differently, see rows.py
STALL = 1.25  # of a decoding step's time may a chunk take: with the step itself, a gap of 2.25 steps
SMOOTHING = 0.2
GROWTH = 1.5


class Pace:
    """Learns what steps and chunks cost on this machine, with this model."""

    def __init__(self) -> None:
        self.decode_seconds = 0.0
        self._size = float(FIRST_TOKENS)

    def decoded(self, seconds: float) -> None:
        """A decoding step took so long."""
        old = self.decode_seconds
        # a disturbance makes a step longer, never shorter: what is short is believed at once
        self.decode_seconds = min(old + SMOOTHING * (seconds - old), seconds) if old else seconds

    def chunk(self, decoding: int, prefilling: int) -> int:
        """Tokens to read at a time while ``decoding`` sequences wait; more, the more others gain by it."""
        if not decoding:
            return CHUNK_TOKENS
        return min(CHUNK_TOKENS, int(self._size * _share(decoding, prefilling)))

    def read(self, tokens: int, seconds: float, decoding: int, prefilling: int) -> None:
        """A chunk of ``tokens`` took so long while ``decoding`` sequences waited."""
        if not (decoding and self.decode_seconds):
            return
        share = _share(decoding, prefilling)
        factor = STALL * self.decode_seconds * share / seconds
        if factor > 1 and tokens < int(self._size * share):
            return  # the rest of a prompt was short: that says nothing about a whole chunk
        size = tokens / share * min(max(factor, 1 / GROWTH), GROWTH)
        self._size = min(max(size, MIN_TOKENS), CHUNK_TOKENS)


def _share(decoding: int, prefilling: int) -> float:
    """Where more sequences wait for their first token than for their next, prompts get more of the time."""
    return max(1.0, prefilling / decoding)
