"""The terminal driver of the wizard: a lone Escape is a key at once.

Textual's own driver looks every 100 ms whether more of an escape sequence has come; that can be felt.
"""

from __future__ import annotations

import os
import selectors
from codecs import getincrementaldecoder

from textual import constants
from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver

IDLE_S = 0.1
SLACK_S = 0.002
READ_BYTES = 4096


class QuickDriver(LinuxDriver):
    """Textual's driver with an ear for Escape."""

    def run_input_thread(self) -> None:
        """Turn what the terminal sends into events until the app ends."""
        parser = XTermParser(self._debug)
        decode = getincrementaldecoder("utf-8")(errors="replace").decode
        wait = IDLE_S
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                came = bool(selector.select(wait))
                if came:
                    data = os.read(self.fileno, READ_BYTES)
                    if not data:
                        return
                    for event in parser.feed(decode(data)):
                        self.process_message(event)
                for event in parser.tick():
                    self.process_message(event)
                wait = constants.ESCAPE_DELAY + SLACK_S if came else IDLE_S
