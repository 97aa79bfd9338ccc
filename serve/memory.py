"""How many tokens the cache may hold: from the machine's free memory, or as told."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil

from compressor.errors import UnfitMachineError

log = logging.getLogger("serve.memory")

CACHE_SHARE = 0.4  # of the memory that is free once the weights are loaded
MIN_CONTEXT_TOKENS = 64


def plan_cache(
    bytes_per_token: int, model_context: int, rows: int, max_context: int | None, cache_gib: float | None
) -> tuple[int, int]:
    """Context length of one request and tokens of the whole cache.

    Raises ``UnfitMachineError`` if not even a short context fits.
    """
    allowed = cache_gib * 2**30 if cache_gib is not None else CACHE_SHARE * available_bytes()
    wanted = min(max_context or model_context, model_context)
    budget = min(int(allowed // bytes_per_token), wanted * rows)
    context = min(wanted, budget)
    if context < min(MIN_CONTEXT_TOKENS, wanted):
        needed = MIN_CONTEXT_TOKENS * bytes_per_token / 2**20
        raise UnfitMachineError(
            f"the cache may take {allowed / 2**20:.0f} MiB, too little for {MIN_CONTEXT_TOKENS} tokens "
            f"({needed:.0f} MiB): free memory or raise --cache-gib"
        )
    if context < wanted:
        log.warning("contexts are cut from %d to %d tokens to fit the cache's memory", wanted, context)
    return context, budget


def available_bytes() -> int:
    """Free memory of this machine, or of this container if that is less."""
    available = int(psutil.virtual_memory().available)
    limit, used = (_read_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else max(0, min(available, limit - used))


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
