"""The server process: load the package, listen, drain on SIGTERM."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from compressor.errors import InputError
from serve.app import create_app
from serve.model import share_resources
from serve.service import Service
from serve.settings import Settings

log = logging.getLogger("serve")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
MAX_CONNECTIONS = 1024


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ``CompressorError`` for what keeps it from starting."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    listener = _listen(settings.host, settings.port)
    share_resources(settings.threads)
    service = Service(settings, shared=True)
    app = create_app(settings, service)
    app.router.lifespan_context = _lifespan(service)
    gc.collect()
    gc.freeze()  # what lives as long as the server is not looked through again while tokens wait
    listener.listen(MAX_CONNECTIONS)
    port = listener.getsockname()[1]
    log.info(
        "%s at http://%s:%d/v1: context %d tokens, %d sequences at once, cache of %d tokens (%d MiB)",
        service.name,
        settings.host,
        port,
        service.context,
        settings.sequences,
        service.budget_tokens,
        service.budget_tokens * service.model.cache.shape.bytes_per_token >> 20,
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.drain_seconds) + 5,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn drains, then raises the signal again
        signal.signal(number, _leave)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow happens."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port"
        ) from None
    return listener


def _leave(*_: object) -> None:
    raise SystemExit(0)


def _lifespan(service: Service):  # type: ignore[no-untyped-def]
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    return lifespan
