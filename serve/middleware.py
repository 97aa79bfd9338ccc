"""What every request passes first: host, key, the size of its body, the time it may take to send it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import zlib
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, loggable
from serve.settings import Settings

access_log = logging.getLogger("serve.access")

OPEN_PATHS = ("/", "/health")
BODY_SECONDS = 30.0
GZIP = 31  # zlib's name for the format
DISCARD_SECONDS = 5.0


class Gate:
    """An ASGI middleware; it never touches replies, so that streams stay streams."""

    def __init__(self, app: ASGIApp, settings: Settings, count_reply: Callable[[int], None]) -> None:
        self._app = app
        self._settings = settings
        self._key = settings.api_key
        self._max_body_bytes = settings.max_body_bytes
        self._count_reply = count_reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = 0

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            body = await self._read_body(scope, receive)
            await self._app(_as_get(scope), _replay(body, receive), _for_version(scope, watched_send))
        except ApiError as error:
            if error.status == 413:
                await _discard(receive)
            await _send_error(error, watched_send)
        finally:
            self._count_reply(status)
            seconds = time.monotonic() - began
            access_log.info("%s %s %d %.3fs", scope["method"], loggable(scope["path"]), status, seconds)

    def _check(self, scope: Scope) -> None:
        """Raises ``ApiError`` for a request without the key or with a body that is announced too big."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"localhost").decode("latin-1")
        if not self._settings.answers_to(host):
            raise ApiError(
                403,
                f"this server answers to this machine's own names, not to '{loggable(host)}': start it with "
                "--allowed-host or --api-key",
                code="host_not_allowed",
            )
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if encoding not in ("identity", "gzip", ""):
            raise ApiError(
                415, f"bodies with content-encoding '{loggable(encoding)}' are not taken: send gzip or plain"
            )
        if self._key is not None and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key.encode()):
                raise ApiError(
                    401, "wrong or missing API key: send 'Authorization: Bearer KEY'", code="invalid_api_key"
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_big()

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises ``ApiError`` if it is too big or too slow."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        chunks: list[bytes] = []
        size = 0
        unzip = _unzipper(scope)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client left")
                    chunks.append(self._plain(unzip, message.get("body", b"")))
                    size += len(chunks[-1])
                    if size > self._max_body_bytes:
                        raise self._too_big()
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
        if unzip is not None and not unzip.eof:
            raise _not_gzip()
        return b"".join(chunks)

    def _plain(self, unzip: zlib._Decompress | None, data: bytes) -> bytes:
        """A piece of the body, never more of it than allowed in all."""
        if unzip is None:
            return data
        try:
            return unzip.decompress(data, self._max_body_bytes + 1)
        except zlib.error:
            raise _not_gzip() from None

    def _too_big(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body_bytes} bytes: send less")


def _unzipper(scope: Scope) -> zlib._Decompress | None:
    encoding = dict(scope["headers"]).get(b"content-encoding", b"").strip().lower()
    return zlib.decompressobj(GZIP) if encoding == b"gzip" else None


def _not_gzip() -> ApiError:
    return ApiError(400, "the body is not gzip, which its content-encoding says")


def _as_get(scope: Scope) -> Scope:
    """HEAD is answered wherever GET is; uvicorn leaves the body out."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


def _for_version(scope: Scope, send: Send) -> Send:
    """HTTP/1.0 knows no chunks: its replies are sent whole, with their length."""
    if scope["http_version"] != "1.0":
        return send
    start: Message = {}
    parts: list[bytes] = []

    async def whole(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            return
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            body = b"".join(parts)
            length = (b"content-length", str(len(body)).encode())
            others = [entry for entry in start.get("headers", []) if entry[0].lower() != b"content-length"]
            await send({**start, "headers": [*others, length]})
            await send({"type": "http.response.body", "body": body})

    return whole


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that first gives the body that was read."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _discard(receive: Receive) -> None:
    """Read what a client is still sending, for a while: replying earlier would reset the connection."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await receive()).get("more_body", False):
                pass


async def _send_error(error: ApiError, send: Send) -> None:
    headers = {"content-type": "application/json", "connection": "close", **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})
