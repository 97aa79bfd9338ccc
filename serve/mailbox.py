"""Carries events from the batching thread to the event loop, a whole turn's at once.

A wake-up for every event would have the event loop fight the batching thread for the interpreter while
that still chooses tokens. One at the end of a turn is answered while the engine computes, which needs no
interpreter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve.sequence import Event, Sink

Put = Callable[[tuple[int, Event]], None]


class Mailbox:
    """Filled and sent by the batching thread; emptied on the event loop."""

    def __init__(self) -> None:
        self._letters: list[tuple[Put, int, Event]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def sink(self, put: Put, index: int) -> Sink:
        """A sink whose events reach ``put`` on the running event loop, with ``index``."""
        self._loop = asyncio.get_running_loop()
        return lambda event: self._letters.append((put, index, event))

    def send(self) -> None:
        """Hand over what has gathered."""
        if not self._letters or self._loop is None:
            return
        letters, self._letters = self._letters, []
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_distribute, letters)


def _distribute(letters: list[tuple[Put, int, Event]]) -> None:
    for put, index, event in letters:
        put((index, event))
