"""From the bytes of a request's body to a checked value, without holding up the streams beside it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Depends, Request
from fastapi.routing import APIRouter
from pydantic import BaseModel, ValidationError

from serve.errors import ApiError, bad_request
from serve.fields import check_unknown, describe
from serve.sandbox import RefusalError, Sandbox
from serve.sandbox_worker import RefusedError, read_json

LONG_BODY = 64 << 10  # bytes from which on a body is parsed in the sandbox
_Body = TypeVar("_Body", bound=BaseModel)


def body_of(kind: type[_Body], sandbox: Sandbox) -> Any:
    """A dependency: the request's body as a value of this kind. Raises ``ApiError``."""
    known = frozenset(entry.alias or name for name, entry in kind.model_fields.items())

    async def read(request: Request) -> _Body:
        _check_type(request.headers.get("content-type"))
        value = await _parse(await request.body(), sandbox)
        try:
            if isinstance(value, dict):
                check_unknown(value, known)
            return kind.model_validate(value)
        except ValidationError as error:
            raise describe(error) from None

    return Depends(read)


def describes(kind: type[BaseModel]) -> dict[str, Any]:
    """What a route says of its body in the OpenAPI document."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def component_schemas(kinds: list[type[BaseModel]]) -> dict[str, Any]:
    """The bodies' JSON schemas and those of their parts, by name, for the OpenAPI document."""
    schemas: dict[str, Any] = {}
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
    return schemas


def post(
    router: APIRouter, path: str, kind: type[BaseModel]
) -> Callable[[Callable[..., Awaitable[Any]]], Callable[..., Awaitable[Any]]]:
    """A route that takes a body of this kind."""
    return router.post(path, openapi_extra=describes(kind), response_model=None)


async def _parse(raw: bytes, sandbox: Sandbox) -> Any:
    try:
        return read_json(raw) if len(raw) < LONG_BODY else await sandbox.ask("json", raw)
    except (RefusedError, RefusalError) as error:
        raise bad_request(str(error)) from None


def _check_type(given: str | None) -> None:
    """A page of another origin can post every type but JSON without asking: only JSON is taken."""
    kind = (given or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        sent = f", not '{kind[:60]}'" if kind else ""
        raise ApiError(415, f"send the body with the header 'Content-Type: application/json'{sent}")
