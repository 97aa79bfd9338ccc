"""Follows a run's event file: what is new since the last look, also over a run that is resumed."""

from __future__ import annotations

import json
from pathlib import Path

from compressor.events import Event, event_from_dict

Timed = tuple[float, Event]


class EventFile:
    """Reads ``events.jsonl`` piece by piece; a line that is not whole yet waits for the next look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""

    def new(self) -> list[Timed]:
        """(seconds since 1970, event) of every line written since the last call, in order.

        A file that became shorter was begun anew and is read from its start. Lines that are no event
        (a power cut in mid-line, another version) are passed over.
        """
        try:
            size = self.path.stat().st_size
            if size < self._offset:
                self._offset, self._rest = 0, b""
            if size == self._offset:
                return []
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except OSError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [timed for line in lines if (timed := parsed(line)) is not None]


def parsed(line: bytes) -> Timed | None:
    """The event of a line with its time, or None."""
    try:
        data = json.loads(line)
        time = float(data.pop("time", 0.0))
        return time, event_from_dict(data)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
