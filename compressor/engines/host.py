"""What machine a figure was taken on, and whether the machine was fit to take it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from compressor.engines.energy import EnergyMeter
from compressor.errors import MemoryExhaustedError, UnfitMachineError

OTHER_LOAD_SHARE = 0.1
"""Share of the cores that other processes may use before figures are marked."""

WATCH_SECONDS = 0.25
CLOCK_JUMP_SECONDS = 1.0
CPU_FOLDER = Path("/sys/devices/system/cpu")
CGROUP_STAT = Path("/sys/fs/cgroup/cpu.stat")
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")


def host_conditions() -> dict[str, Any]:
    """Device, drivers, affinity, governor and load at this moment, recorded with every figure."""
    return {
        "device": cpu_name(),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "governor": governor(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **drivers(),
    }


def host_faults(
    needed_bytes: int = 0,
    *,
    busy_share: Callable[[], float] | None = None,
    available_bytes: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
) -> list[str]:
    """Why this host is not fit to measure on, one line each; none if it is fit.

    Looks at what other processes use of the cores, at memory (``needed_bytes`` for the model), at the
    frequency governor and at throttling. Takes ``WATCH_SECONDS``.
    """
    faults = []
    share = (busy_share or others_share)()
    if share > OTHER_LOAD_SHARE:
        faults.append(f"other processes use {share:.0%} of the cores: stop them")
    free = available_bytes()
    if free < needed_bytes:
        faults.append(f"{free / 2**30:.1f} GiB of memory are free, {needed_bytes / 2**30:.1f} are needed")
    if governor() == "powersave" and not (CPU_FOLDER / "intel_pstate").exists():
        faults.append("the frequency governor is 'powersave': set it to 'performance'")
    return faults


def require_free_memory(
    needed_bytes: int, available_bytes: Callable[[], int] = lambda: int(psutil.virtual_memory().available)
) -> None:
    """Raise ``UnfitMachineError`` before something is loaded that does not fit what is free."""
    free = available_bytes()
    if free < needed_bytes:
        raise UnfitMachineError(
            f"{needed_bytes / 2**30:.2f} GiB of memory are needed and {free / 2**30:.2f} GiB are free: "
            "close other programs, or lower --memory-budget"
        )


def require_free_gpu(needed_bytes: int, free_bytes: Callable[[], int] | None = None) -> None:
    """Raise ``MemoryExhaustedError`` before an engine starts on a GPU whose memory is not free; nothing is
    asked where there is none. ``free_bytes``: of the first GPU, unless given."""
    free = (free_bytes or _free_gpu_bytes)()
    if 0 <= free < needed_bytes:
        raise MemoryExhaustedError(
            f"{needed_bytes / 2**30:.2f} GiB of the GPU's memory are needed and {free / 2**30:.2f} GiB are "
            "free: end what else runs on it, or lower --memory-budget"
        )


def _free_gpu_bytes() -> int:
    """Of the first GPU; -1 where there is none."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else -1


def out_of_memory(error: BaseException) -> bool:
    """Whether an engine's error says that memory ran out."""
    words = ("out of memory", "no available memory", "insufficient memory", "larger than the available")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def others_share() -> float:
    """Share of all cores' time that other processes use, 0 to 1, watched for ``WATCH_SECONDS``."""
    watch = HostWatch()
    time.sleep(WATCH_SECONDS)
    return watch.others_share()


class HostWatch:
    """Watches the host from its making on, at no cost: what disturbed a measurement meanwhile."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._began = time.monotonic()
        self._clock = time.time()
        self._energy = EnergyMeter()
        self._busy, self._mine = _busy_seconds(), self._own_seconds()
        self._throttled = throttled_periods()

    def others_share(self) -> float:
        """Share of all cores' time that other processes used since."""
        elapsed = max(1e-3, time.monotonic() - self._began)
        others = (_busy_seconds() - self._busy) - (self._own_seconds() - self._mine)
        return max(0.0, others / elapsed / (os.cpu_count() or 1))

    def marks(self) -> dict[str, Any]:
        """What a figure taken meanwhile carries: others' share, the energy used where the device reports
        it, and ``unfit`` with the reasons, if any."""
        share = self.others_share()
        throttled = throttled_periods() - self._throttled
        reasons = []
        if share > OTHER_LOAD_SHARE:
            reasons.append(f"other processes used {share:.0%} of the cores")
        if throttled:
            reasons.append(f"the CPU was throttled {throttled} times")
        jump = (time.time() - self._clock) - (time.monotonic() - self._began)
        if abs(jump) > CLOCK_JUMP_SECONDS:
            reasons.append(f"the clock jumped by {jump:+.0f} s, as when a machine sleeps or its time is set")
        joules = self._energy.joules()
        return {
            "others_share": round(share, 3),
            **({} if joules is None else {"energy_j": round(joules, 3)}),
            **({"unfit": reasons} if reasons else {}),
        }

    def _own_seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def throttled_periods() -> int:
    """How often this container's CPU quota or the CPU's temperature has held it back so far."""
    periods = 0
    if CGROUP_STAT.is_file():
        fields = dict(line.split() for line in CGROUP_STAT.read_text(encoding="utf-8").splitlines())
        periods += int(fields.get("nr_throttled", 0))
    for path in CPU_FOLDER.glob("cpu*/thermal_throttle/core_throttle_count"):
        periods += int(path.read_text(encoding="utf-8"))
    return periods


def drivers(nvidia: Path = NVIDIA_VERSION) -> dict[str, str]:
    """The kernel, which is the CPU's driver, and the NVIDIA driver where one is loaded."""
    found = {"kernel": f"{platform.system()} {platform.release()}"}
    try:
        found["nvidia_driver"] = nvidia.read_text(encoding="utf-8").splitlines()[0].split(":", 1)[-1].strip()
    except (OSError, IndexError):
        return found
    return found


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


def governor() -> str:
    """The frequency governor of the first core, or ``unknown``."""
    try:
        return (CPU_FOLDER / "cpu0/cpufreq/scaling_governor").read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle - guests)
