"""The FastAPI application: its endpoints, how errors look, and what wraps every request."""

from __future__ import annotations

import logging
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from serve.body import component_schemas
from serve.chat_completions import chat_routes
from serve.completions import completion_routes
from serve.errors import ApiError
from serve.metrics import CONTENT_TYPE
from serve.middleware import Gate
from serve.model_info import info_routes
from serve.responses import response_routes
from serve.schemas import ChatBody, CompletionBody, DetokenizeBody, ResponsesBody, TokenizeBody
from serve.service import Service
from serve.settings import Settings

log = logging.getLogger("serve.app")


def create_app(settings: Settings, service: Service) -> FastAPI:
    """The application over an open service."""
    app = FastAPI(title="edge-compressor", docs_url=None, redoc_url=None, version="1")
    for routes in (chat_routes, completion_routes, response_routes, info_routes):
        app.include_router(routes(service))
    _describe_bodies(app)
    _add_operations(app, service)
    _add_error_handlers(app)
    app.add_middleware(Gate, settings=settings, count_reply=service.metrics.count_reply)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _describe_bodies(app: FastAPI) -> None:
    """Bodies are read by ourselves (body.py): the OpenAPI document is told of them here."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        kinds = [ChatBody, CompletionBody, ResponsesBody, TokenizeBody, DetokenizeBody]
        schemas.update(component_schemas(kinds))
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add_operations(app: FastAPI, service: Service) -> None:
    page = files("serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> Response:
        """200 when the server can answer, 503 when it is starting or stopping."""
        ready = service.scheduler.healthy
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/", response_class=HTMLResponse)
    async def chat_page() -> HTMLResponse:
        """A small chat page."""
        return HTMLResponse(page)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return _reply(error)

    @app.exception_handler(RecursionError)
    async def too_deep(_: Request, __: RecursionError) -> JSONResponse:
        return _reply(ApiError(400, "the body is nested too deeply"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is no {request.url.path}; /v1/chat/completions and /v1/completions answer",
            405: f"{request.method} is not allowed on {request.url.path}",
        }.get(error.status_code, str(error.detail))
        allow = (error.headers or {}).get("Allow", "")
        if "GET" in allow.split(", "):
            allow += ", HEAD"
        return _reply(ApiError(error.status_code, message, allow=allow or None))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return _reply(ApiError(500, "the server failed; its log says why"))


def _reply(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)
