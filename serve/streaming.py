"""Server-sent events, and noticing that a client left."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from serve.errors import ApiError
from serve.service import Completion, Generation

log = logging.getLogger("serve.streaming")

DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED = 499  # nobody reads it; the access log does
_Result = TypeVar("_Result")


def event_stream(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Send chunks as they come, then [DONE]; an error becomes the last event."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_encode(chunks), media_type="text/event-stream", headers=headers)


def typed_event_stream(events: AsyncIterator[tuple[str, dict[str, Any]]]) -> StreamingResponse:
    """As /v1/responses has it: each event has a type and a number."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_encode_typed(events), media_type="text/event-stream", headers=headers)


async def complete_or_leave(request: Request, generation: Generation) -> list[Completion]:
    """The finished sequences; the work stops if the client leaves before."""
    return await unless_gone(request, generation.complete())


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """What the work gives; it is cancelled if the client leaves before."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_CLOSED, "the client left")
    finally:
        left.cancel()
        task.cancel()


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


async def _encode_typed(events: AsyncIterator[tuple[str, dict[str, Any]]]) -> AsyncIterator[bytes]:
    number = 0
    try:
        async for kind, fields in events:
            yield _typed(kind, number, fields)
            number += 1
    except ApiError as error:
        fields = {"code": error.code, "message": error.message, "param": error.param}
        yield _typed("error", number, fields) + DONE
    except Exception:
        log.exception("a stream failed")
        fields = {"code": "server_error", "message": "the server failed; its log says why", "param": None}
        yield _typed("error", number, fields) + DONE


def _typed(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\n".encode() + encode_event({"type": kind, "sequence_number": number, **fields})


def encode_event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
