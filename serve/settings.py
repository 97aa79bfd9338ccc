"""How to serve: what the flags of ``python -m serve`` mean, as one value."""

from __future__ import annotations

import ipaddress
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from compressor.errors import InputError
from compressor.manifest import CacheNumerics


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CONCURRENCY = 8
"""Sequences at once where nothing else is asked for; on a GPU vLLM decides by its memory."""


@dataclass(frozen=True)
class Settings:
    """Raises ``InputError`` for values that cannot be meant."""

    package: Path
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    insecure: bool = False
    threads: int = field(default_factory=usable_cores)
    max_concurrency: int | None = None
    queue_size: int = 64
    max_context: int | None = None
    cache_gib: float | None = None
    kv_cache: CacheNumerics | None = None
    request_timeout_seconds: float = 600.0
    drain_seconds: float = 30.0
    max_body_bytes: int = 4 << 20
    cors_origins: tuple[str, ...] = ()
    model_name: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_connections: int = 1024

    @property
    def sequences(self) -> int:
        """That run at once on a CPU."""
        return self.max_concurrency or CONCURRENCY

    def __post_init__(self) -> None:
        for name in ("threads", "max_concurrency", "max_body_bytes", "max_connections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port must be 0 to 65535, not {self.port}")
        if self.queue_size < 0:
            raise InputError(f"--queue-size must be 0 or more, not {self.queue_size}")
        if self.max_context is not None and self.max_context < 2:
            raise InputError(f"--max-context must be 2 or more, not {self.max_context}")
        if not 0 <= self.drain_seconds < math.inf:
            raise InputError(f"--drain-seconds must be 0 or more, not {self.drain_seconds}")
        if self.cache_gib is not None and self.cache_gib <= 0:
            raise InputError(f"--cache-gib must be positive, not {self.cache_gib}")
        if not (self.api_key or self.insecure or is_loopback(self.host)):
            raise InputError(
                f"serving on {self.host} lets others in: give --api-key KEY (or EDGE_API_KEY), or --insecure"
            )

    def answers_to(self, host: str) -> bool:
        """Whether a request with this Host header is meant for us.

        A page can have its own name resolve to a loopback address and then read what we answer; the header
        still says its name. Where a key is asked for, or anybody may ask, it does not matter.
        """
        if self.api_key or not is_loopback(self.host):
            return True
        name = _host_name(host)
        return is_loopback(name) or name in {allowed.lower() for allowed in self.allowed_hosts}


def _host_name(host: str) -> str:
    """Without the port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower().rstrip(".")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
