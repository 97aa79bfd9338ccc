"""Server-sent events, and noticing that a client left."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from serve.errors import ApiError
from serve.service import Completion, Generation

log = logging.getLogger("serve.streaming")

DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED = 499  # nobody reads it; the access log does


def event_stream(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Send chunks as they come, then [DONE]; an error becomes the last event."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_encode(chunks), media_type="text/event-stream", headers=headers)


async def complete_or_leave(request: Request, generation: Generation) -> list[Completion]:
    """The finished sequences; the work stops if the client leaves before."""
    work = asyncio.ensure_future(generation.complete())
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ApiError(CLIENT_CLOSED, "the client left")
    finally:
        left.cancel()
        if not work.done():
            work.cancel()
            generation.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _encode(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield encode_event(chunk)
    except ApiError as error:
        yield encode_event(error.body)
    except Exception:
        log.exception("a stream failed")
        yield encode_event(ApiError(500, "the server failed; its log says why").body)
    yield DONE


def encode_event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
