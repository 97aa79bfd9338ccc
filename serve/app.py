"""The FastAPI application: its endpoints, how errors look, and what wraps every request."""

from __future__ import annotations

import logging
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from serve.chat_completions import chat_routes
from serve.completions import completion_routes
from serve.errors import ApiError
from serve.metrics import CONTENT_TYPE
from serve.middleware import Gate
from serve.model_info import info_routes
from serve.responses import response_routes
from serve.service import Service
from serve.settings import Settings

log = logging.getLogger("serve.app")


def create_app(settings: Settings, service: Service) -> FastAPI:
    """The application over an open service."""
    app = FastAPI(title="edge-compressor", docs_url=None, redoc_url=None, version="1")
    for routes in (chat_routes, completion_routes, response_routes, info_routes):
        app.include_router(routes(service))
    _add_operations(app, service)
    _add_error_handlers(app)
    app.add_middleware(Gate, settings=settings, count_reply=service.metrics.count_reply)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


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

    @app.exception_handler(RequestValidationError)
    async def invalid_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return _reply(_validation_error(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is no {request.url.path}; /v1/chat/completions and /v1/completions answer",
            405: f"{request.method} is not allowed on {request.url.path}",
        }.get(error.status_code, str(error.detail))
        return _reply(ApiError(error.status_code, message))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return _reply(ApiError(500, "the server failed; its log says why"))


def _reply(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing wrong, with its place; what was sent is not repeated."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    message = f"{place}: {first['msg']}" if place else f"the body must be a JSON object: {first['msg']}"
    return ApiError(400, message, param=place or None)
