"""Replies as JSON, piece by piece: a reply with log-probabilities has millions of values."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from fastapi.responses import Response

from serve.threads import background

DEPTH = 5  # of a token's log-probabilities in a chat's reply
_threads = background("replies", 1)


async def json_reply(value: dict[str, Any]) -> Response:
    """A reply of a value whose lists may be iterators, which are used up."""
    body = await asyncio.get_running_loop().run_in_executor(_threads, encode, value)
    return Response(body, media_type="application/json")


def encode(value: Any) -> bytes:
    """JSON, made in steps of microseconds, between which other threads get their turn."""
    return "".join(pieces(value)).encode()


def pieces(value: Any, depth: int = DEPTH) -> Iterator[str]:
    if isinstance(value, dict) and depth:
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield f"{',' if number else ''}{_dump(key)}:"
            yield from pieces(item, depth - 1)
        yield "}"
    elif isinstance(value, Iterator) or (isinstance(value, list) and depth):
        yield "["
        for number, item in enumerate(value):
            if number:
                yield ","
            yield from pieces(item, max(depth - 1, 0))
        yield "]"
    else:
        yield _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
