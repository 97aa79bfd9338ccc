"""What machine a figure was taken on, and whether the machine was fit to take it."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any


def host_conditions() -> dict[str, Any]:
    """Device, affinity, governor and load at this moment, recorded with every figure."""
    return {
        "device": cpu_name(),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "governor": _governor(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


@cache
def cpu_name() -> str:
    """The CPU's model name as the system reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        if line.lower().startswith(("model name", "model\t", "hardware")):
            name = line.split(":", 1)[1].strip()
            if not name.isdigit():
                return name
    return platform.machine()


def _governor() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"
