"""Work that strangers could make endless, in a process that can be ended: templates, grammars, large bodies.

The process is started when it is first needed and again after it was ended: because a request took more
processor time than allowed, or because its client left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import marshal
import os
import signal
import sys
from pathlib import Path
from typing import Any

import serve
from serve.errors import ApiError

log = logging.getLogger("serve.sandbox")

WALL_SECONDS = 60.0  # for a machine so busy that processor time hardly passes


class RefusalError(Exception):
    """The sandbox's answer that the input is wrong, or that it was ended over it."""


class Sandbox:
    """One process, one request at a time. ``seconds`` of processor time are allowed for each."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder = folder
        self._seconds = seconds
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def ask(self, kind: str, payload: Any) -> Any:
        """The answer. Raises ``RefusalError``; when cancelled, ends the work."""
        frame = marshal.dumps((kind, payload))
        async with self._turn:
            for attempt in range(2):
                process = await self._running()
                try:
                    async with asyncio.timeout(WALL_SECONDS):
                        good, value = await _exchange(process, frame)
                except (OSError, asyncio.IncompleteReadError):
                    code = await self._end()
                    if attempt or code is None or code == -_SIGPROF:
                        break
                    log.warning("the sandbox ended with %s: starting another", code)
                except TimeoutError:
                    await self._end()
                    break
                except BaseException:
                    await self._end()
                    raise
                else:
                    if good:
                        return value
                    raise RefusalError(value)
        raise RefusalError(f"it takes more than {self._seconds:g} s of processor time")

    async def start(self) -> None:
        """Have the process ready before the first request."""
        async with self._turn:
            await self._running()

    async def close(self) -> None:
        await self._end()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            command = [sys.executable, "-P", "-m", "serve.sandbox_worker"]
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    str(self._folder.resolve()),
                    str(self._seconds),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env=_environment(),
                    start_new_session=True,
                )
            except OSError as error:
                log.error("the sandbox can't be started: %s", error)
                raise ApiError(503, "the server is short of memory or processes: try again later") from None
        return self._process

    async def _end(self) -> int | None:
        """End the process; its exit code if it had ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(TimeoutError):  # after the end of its output it is about to be gone
            async with asyncio.timeout(0.5 if process.stdout and process.stdout.at_eof() else 0):
                return await process.wait()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.wait())
        return None


_SIGPROF = int(signal.SIGPROF)


async def _exchange(process: asyncio.subprocess.Process, frame: bytes) -> tuple[bool, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(len(frame).to_bytes(4, "little") + frame)
    await process.stdin.drain()
    size = int.from_bytes(await process.stdout.readexactly(4), "little")
    good, value = marshal.loads(await process.stdout.readexactly(size))
    return good, value


def _environment() -> dict[str, str]:
    """Ours, with this code importable wherever we were started from."""
    root = str(Path(serve.__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}
