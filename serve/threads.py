"""Threads for what may take a while beside the streams: they give way to the threads that compute tokens."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

NICENESS = 10


def background(name: str, count: int) -> ThreadPoolExecutor:
    """Threads that the system serves last; on Linux niceness is a thread's own."""
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_give_way)


def _give_way() -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
