"""Who may hold a connection, and for how long without asking for anything.

Connections that wait (for the head or the body of a request, or idle) are many for an attacker and few for
everybody else: where there are too many, the one that has waited longest is closed. Where all are at work,
further ones are answered for /health and /metrics alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from collections import Counter, OrderedDict
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.errors import ApiError

HEADER_SECONDS = 10.0  # for the head of a request, from its first byte or the connection's beginning
READING_SECONDS = 30.0  # that a client may leave its reply unread once the buffers are full
RESERVE = 32  # connections beyond the most, for operations
OPERATIONS = ("/health", "/metrics")
FILES = 128  # that the server has open beside connections


class Guard:
    """Counts connections. ``most``: in all; half of them may come from one address."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._most_of_peer = max(1, most // 2)
        self._peers: Counter[str] = Counter()
        self._open: set[GuardedProtocol] = set()
        self._waiting: OrderedDict[GuardedProtocol, None] = OrderedDict()  # longest waiting first

    def admit(self, connection: GuardedProtocol) -> None:
        """A new connection: it may cost another one its place, or be for operations alone."""
        self._open.add(connection)
        self._peers[connection.peer] += 1
        if self._peers[connection.peer] > self._most_of_peer:
            connection.limited = not self._close_one(connection.peer)
        elif len(self._open) > self._most:
            connection.limited = not self._close_one(None)
        if len(self._open) > self._most + RESERVE and not self._close_one(None):
            connection.give_up()
        else:
            self._waiting[connection] = None

    def forget(self, connection: GuardedProtocol) -> None:
        if connection in self._open:
            self._open.discard(connection)
            self._waiting.pop(connection, None)
            self._peers[connection.peer] -= 1
            if not self._peers[connection.peer]:
                del self._peers[connection.peer]

    def working(self, connection: GuardedProtocol) -> None:
        self._waiting.pop(connection, None)

    def waiting(self, connection: GuardedProtocol) -> None:
        if connection in self._open:
            self._waiting[connection] = None

    def _close_one(self, peer: str | None) -> bool:
        """Close the connection that has waited longest, of this peer or of any."""
        for connection in self._waiting:
            if peer is None or connection.peer == peer:
                connection.give_up()
                self.forget(connection)
                return True
        return False


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's connection, under a guard and with time limits."""

    guard: Guard  # set by ``protocol``

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.peer = ""
        self.limited = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.peer = self.client[0] if self.client else ""
        self._expect_head()
        self.guard.admit(self)
        if self.limited:
            self.app = _operations_only(self.app)

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.forget(self)
        self._head_timer = _stopped(self._head_timer)
        self._unread_timer = _stopped(self._unread_timer)
        super().connection_lost(exc)

    def give_up(self) -> None:
        """Close it at once."""
        self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_timer = _stopped(self._head_timer)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.guard.working(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self.guard.waiting(self)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(READING_SECONDS, self.give_up)

    def resume_writing(self) -> None:
        self._unread_timer = _stopped(self._unread_timer)
        super().resume_writing()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._no_head)

    def _no_head(self) -> None:
        error = ApiError(408, f"the head of the request did not arrive within {HEADER_SECONDS:.0f} s")
        body = json.dumps(error.body).encode()
        head = b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()


def protocol(most: int) -> type[GuardedProtocol]:
    """The protocol for uvicorn, with a guard of its own."""
    return type("Guarded", (GuardedProtocol,), {"guard": Guard(most)})


def allow_files(connections: int) -> int:
    """Have the system let us open so many connections; how many it does."""
    wanted = connections + RESERVE + FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(connections, soft - RESERVE - FILES))


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _operations_only(app: ASGIApp) -> Any:
    """The application for a connection beyond the most."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPERATIONS:
            await app(scope, receive, send)
            return
        error = ApiError(503, "too many connections are at work: try again later", retry_after_seconds=1)
        headers = {"content-type": "application/json", "connection": "close", **error.headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 503, "headers": raw})
        await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})

    return answer
