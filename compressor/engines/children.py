"""Processes that we start: they end with us, however we end, so that none is left holding a GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PR_SET_PDEATHSIG = 1
"""Linux's prctl that sends a signal to a process whose parent died (``man 2 prctl``)."""
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Done:
    """How a child ended, and what it wrote."""

    returncode: int
    output: str


def start_child(
    command: Sequence[str], cwd: Path, stderr: int | IO[bytes] = subprocess.PIPE, **options: Any
) -> subprocess.Popen[str]:
    """Start a child in a process group of its own, with pipes for its input and output.

    It is killed by the kernel if we die (Linux), and its group by ``end_child``, whatever it started.
    """
    return subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        **options,
    )


def end_child(process: subprocess.Popen[str]) -> None:
    """End a child and all that it started; closes the pipes."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):  # what it no longer read
                stream.close()


def run_child(command: Sequence[str], text: str, cwd: Path) -> Done:
    """Run a child on that input to its end; it does not outlive what interrupts us, SIGTERM among that
    where it is raised as an exception."""
    process = start_child(command, cwd, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(text)
        return Done(process.returncode, output)
    finally:
        end_child(process)


def _die_with_parent() -> None:
    """In the child, between fork and exec, where nothing may be loaded any more."""
    if _PRCTL is not None:
        _PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)
