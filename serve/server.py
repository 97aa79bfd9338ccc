"""The server process: load the package, listen, drain on SIGTERM."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from compressor.errors import InputError
from serve.app import create_app
from serve.connections import allow_files, protocol
from serve.errors import loggable
from serve.model import share_resources
from serve.service import Service
from serve.settings import Settings

log = logging.getLogger("serve")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
BACKLOG = 1024
SWITCH_SECONDS = 0.001
"""How long a thread that computes in Python may keep the interpreter from the others: the batching thread
asks for it several times a token."""


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
    sys.setswitchinterval(SWITCH_SECONDS)
    listener.listen(BACKLOG)
    port = listener.getsockname()[1]
    log.info(
        "%s at http://%s:%d/v1: context %d tokens, %d sequences at once, cache of %d tokens (%d MiB)",
        loggable(service.name),
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
        http=protocol(allow_files(settings.max_connections)),
        timeout_keep_alive=30,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn drains, then raises the signal again
        signal.signal(number, _leave)
    _Server(config, service).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Keeps the promise that it is gone within the drain's time, whatever runs when it is asked to leave."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        began = time.monotonic()
        self._service.drain()
        left = self._service.settings.drain_seconds - (time.monotonic() - began)
        self.config.timeout_graceful_shutdown = max(0.1, left)  # type: ignore[assignment]
        await super().shutdown(sockets)


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
        await service.open()
        yield
        await service.close()

    return lifespan
