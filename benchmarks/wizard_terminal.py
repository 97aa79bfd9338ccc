"""A pseudo-terminal with a program in it: press keys, and learn when the screen showed the answer."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path
from types import TracebackType

ESCAPES = re.compile(rb"\x1b\[[0-9;?<>=]*[a-zA-Z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[=>()][0B]?")
KEYS = {"ctrl+n": b"\x0e", "ctrl+s": b"\x13", "ctrl+p": b"\x10", "escape": b"\x1b", "f1": b"\x1bOP",
        "tab": b"\t", "down": b"\x1b[B", "up": b"\x1b[A", "enter": b"\r"}  # fmt: skip
READ_BYTES = 1 << 16


class Terminal:
    """A program in a terminal of ``columns`` by ``rows``. Everything it writes is kept with its time."""

    def __init__(self, command: list[str], folder: Path, columns: int, rows: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._written: list[tuple[float, bytes]] = []
        self._news = threading.Event()
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()

    def press(self, key: str, texts: tuple[str, ...], seconds: float = 30) -> float:
        """Press a key; milliseconds until all texts have been written to the screen since."""
        mark, now = len(self._written), time.perf_counter()
        os.write(self._master, KEYS.get(key, key.encode()))
        return (self._until(texts, mark, seconds) - now) * 1000

    def shown(self, texts: tuple[str, ...], seconds: float = 30) -> float:
        """Seconds from the program's start until all texts had been written."""
        return self._until(texts, 0, seconds) - self.began

    def rest(self, seconds: float = 0.4, longest: float = 3.0) -> None:
        """Wait until nothing has been written for a while."""
        end = time.perf_counter() + longest
        while time.perf_counter() < end:
            last = self._written[-1][0] if self._written else self.began
            if time.perf_counter() - last > seconds:
                return
            time.sleep(0.02)

    def _until(self, texts: tuple[str, ...], mark: int, seconds: float) -> float:
        """When the last of the texts came, as ``time.perf_counter`` counts."""
        end, looked, seen = time.perf_counter() + seconds, mark, b""
        while time.perf_counter() < end:
            while looked < len(self._written):
                moment, data = self._written[looked]
                looked, seen = looked + 1, seen + data
                plain = _plain(seen)
                if all(text in plain for text in texts):
                    return moment
            self._news.wait(0.2)
            self._news.clear()
        raise TimeoutError(f"waited {seconds:.0f} s for {texts}; the screen got: {_plain(seen)[-2000:]}")

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, READ_BYTES)
            except OSError:
                return
            if not data:
                return
            self._written.append((time.perf_counter(), data))
            self._news.set()


def _plain(data: bytes) -> str:
    """What was written, without colours and cursor movements."""
    return ESCAPES.sub(b"", data).decode(errors="replace")
