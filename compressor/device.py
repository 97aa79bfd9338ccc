"""What this machine is, and which profiles fit it."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from compressor.cpu import instructions
from compressor.errors import UnfitMachineError
from compressor.profile import Profile, load_profiles

GIB = 2**30
MEMORY_TOLERANCE = 0.9
"""Share of a device's sold memory that it must show: firmware, drivers and error correction keep some."""

CPUINFO = Path("/proc/cpuinfo")
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
CUDA_DRIVERS = ("libcuda.so.1", "nvcuda.dll")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device, as torch sees it."""

    name: str
    memory_bytes: int
    compute_capability: str = ""


@dataclass(frozen=True)
class Machine:
    """This machine, or what a container lets us have of it.

    ``board`` is the single-board computer's own name, if it is one; ``usable_cores`` heeds affinity and
    the container's quota; memory heeds the container's limit.
    """

    cpu_name: str
    board: str
    physical_cores: int
    logical_cores: int
    usable_cores: int
    isa: tuple[str, ...]
    memory_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...] = ()
    system: str = ""

    @property
    def cpu_label(self) -> str:
        """Name of the CPU with its cores, as the ledger and the manifest name the device."""
        return f"{self.cpu_name}, {self.usable_cores} cores"


@dataclass(frozen=True)
class Fit:
    """Whether a machine is what a profile is for; ``reason`` says why, or why not."""

    ok: bool
    reason: str


def detect(disk: Path | None = None) -> Machine:
    """This machine. ``disk`` is a folder on the disk to look at (default: the current folder)."""
    memory = psutil.virtual_memory()
    limit, used = container_memory()
    logical = psutil.cpu_count(logical=True) or 1
    return Machine(
        cpu_name=_cpu_name(),
        board=_board_name(),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        usable_cores=_usable_cores(logical),
        isa=instructions(_text(CPUINFO)),
        memory_bytes=min(memory.total, limit or memory.total),
        memory_available_bytes=min(memory.available, max(0, limit - used) if limit else memory.available),
        disk_free_bytes=shutil.disk_usage(disk or Path.cwd()).free,
        gpus=_gpus(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
    )


def describe(machine: Machine) -> list[tuple[str, str]]:
    """Label and value of each fact, to print."""
    gpus = [f"{gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB" for gpu in machine.gpus]
    return [
        ("CPU", machine.cpu_name),
        *([("board", machine.board)] if machine.board else []),
        (
            "cores",
            f"{machine.physical_cores} physical, {machine.logical_cores} logical, "
            f"{machine.usable_cores} usable",
        ),
        ("instructions", ", ".join(machine.isa) or "none of interest"),
        (
            "memory",
            f"{machine.memory_bytes / GIB:.1f} GiB, {machine.memory_available_bytes / GIB:.1f} GiB available",
        ),
        ("disk", f"{machine.disk_free_bytes / GIB:.1f} GiB free"),
        ("CUDA", "; ".join(gpus) or "none"),
        *([("CUDA shown", hint)] if (hint := cuda_hint()) else []),
        ("system", machine.system),
    ]


def label(profile: Profile, machine: Machine) -> str:
    """Name of the machine's device that the profile is for, as the ledger and the manifest name it."""
    if profile.device.kind == "cpu":
        return machine.cpu_label
    named = (name for name, _ in _candidates(profile, machine) if _named(name, profile.device.match))
    return next(named, "no CUDA device")


def fits(profile: Profile, machine: Machine) -> Fit:
    """Whether ``machine`` is a device that ``profile`` is for: kind, name and memory."""
    candidates = _candidates(profile, machine)
    needed = profile.device.memory_gib * GIB * MEMORY_TOLERANCE
    for name, memory_bytes in candidates:
        if _named(name, profile.device.match) and memory_bytes >= needed:
            return Fit(True, f"{name}, {memory_bytes / GIB:.1f} GiB")
    kind = "CUDA device" if profile.device.kind == "cuda" else "CPU"
    named = f" named {' or '.join(profile.device.match)}" if profile.device.match and candidates else ""
    found = " and ".join(f"{name} with {size / GIB:.1f} GiB" for name, size in candidates)
    hidden = cuda_hint() if kind == "CUDA device" else ""
    return Fit(
        False,
        f"needs a {kind}{named} with {profile.device.memory_gib:g} GiB; this machine has {found or 'none'}"
        f"{f' ({hidden})' if hidden else ''}",
    )


def require(profile: Profile, machine: Machine) -> None:
    """Raise ``UnfitMachineError`` unless ``machine`` is what ``profile`` is for."""
    fit = fits(profile, machine)
    if fit.ok:
        return
    fitting = [known.name for known in load_profiles() if fits(known, machine).ok]
    choice = (
        f"pick one of: {', '.join(fitting)}"
        if fitting
        else "write a profile for this machine (`compress profiles show starter-cpu` is one to copy)"
    )
    raise UnfitMachineError(
        f"profile '{profile.name}' {fit.reason}. Measure on the device itself, or {choice}"
    )


def auto(machine: Machine) -> Profile:
    """The profile that fits best: CUDA before CPU, named devices before any, the most memory.

    Raises ``UnfitMachineError`` if none fits.
    """
    fitting = [profile for profile in load_profiles() if fits(profile, machine).ok]
    if not fitting:
        raise UnfitMachineError(
            "no profile fits this machine: copy one (`compress profiles show starter-cpu`), "
            "lower its memory, and pass its path with --profile"
        )
    return max(
        fitting,
        key=lambda p: (p.device.kind == "cuda", bool(p.device.match), p.device.memory_gib, p.name),
    )


def unknown_gpu(machine: Machine) -> str:
    """Name of this machine's GPU where no profile is for it; nothing where one is, or there is no GPU."""
    if not machine.gpus or any(p.device.kind == "cuda" and fits(p, machine).ok for p in load_profiles()):
        return ""
    return machine.gpus[0].name


def cuda_hint(environment: Mapping[str, str] = os.environ) -> str:
    """Why fewer GPUs are seen than there may be, in words; nothing where nothing is known to hide one."""
    reasons = []
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        reasons.append(f"CUDA_VISIBLE_DEVICES={chosen or 'nothing'} hides others")
    if trouble := _cuda_trouble():
        reasons.append(trouble)
    return "; ".join(reasons)


def _cuda_trouble() -> str:
    """What CUDA says where a driver is installed and torch cannot use it, as one too old for its build."""
    if not cuda_driver_present() or importlib.util.find_spec("torch") is None:
        return ""
    import torch

    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install it without the CPU's index"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()), "")
        return f"CUDA {torch.version.cuda}, which PyTorch is built for, does not start: {first}"
    return ""


def cuda_driver_present() -> bool:
    """Whether an NVIDIA driver is installed; costs no torch import."""
    for library in CUDA_DRIVERS:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def container_memory(
    root: Path = CGROUP_ROOT, membership: Path = CGROUP_MEMBERSHIP
) -> tuple[int | None, int]:
    """(limit, used) in bytes of the tightest control group around this process; (None, 0) without one.

    Reads cgroup v2 (``memory.max``) and v1 (``memory.limit_in_bytes``). Page cache that the kernel
    would give back does not count as used.
    """
    tightest: tuple[int | None, int] = (None, 0)
    for folder in _cgroup_folders(root, membership, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= psutil.virtual_memory().total:
            continue
        if tightest[0] is None or limit < tightest[0]:
            used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
            tightest = (limit, max(0, used - _reclaimable(folder / "memory.stat")))
    return tightest


def container_cpus(root: Path = CGROUP_ROOT, membership: Path = CGROUP_MEMBERSHIP) -> float | None:
    """Cores' worth of time that the control groups around this process allow; None without a quota."""
    quotas = [_quota(folder) for folder in _cgroup_folders(root, membership, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _candidates(profile: Profile, machine: Machine) -> list[tuple[str, int]]:
    """(name, memory in bytes) of the machine's devices of the profile's kind."""
    if profile.device.kind == "cuda":
        return [(gpu.name, gpu.memory_bytes) for gpu in machine.gpus]
    name = f"{machine.board} ({machine.cpu_name})" if machine.board else machine.cpu_name
    return [(name, machine.memory_bytes)]


def _named(name: str, words: list[str]) -> bool:
    """Whole words only, so that an L40S is no L4; case does not matter."""
    return not words or any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", name, re.IGNORECASE) for word in words
    )


def _usable_cores(logical: int) -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    quota = container_cpus()
    return max(1, min(allowed, math.ceil(quota) if quota else allowed))


def _cpu_name() -> str:
    """The CPU's marketing name, or the best that the system knows."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(CPUINFO), re.MULTILINE)
    if found:
        return " ".join(found.group(1).split())
    if sys.platform == "darwin":
        query = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        return answer or platform.processor()
    return platform.processor() or platform.machine() or "unknown CPU"


def _board_name() -> str:
    return _text(DEVICE_TREE_MODEL).rstrip("\x00\n ")


def _gpus() -> tuple[Gpu, ...]:
    if not cuda_driver_present() or importlib.util.find_spec("torch") is None:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    # A slice of a GPU (MIG) has the slice in its name, as in "NVIDIA A100-SXM4-40GB MIG 3g.20gb".
    return tuple(Gpu(d.name, d.total_memory, f"{d.major}.{d.minor}") for d in devices)


def _cgroup_folders(root: Path, membership: Path, controller: str) -> list[Path]:
    """Folders of the control groups around this process, v2 and v1, innermost first.

    A container often sees its own group mounted at the root under a path that only the host knows:
    folders that do not exist are skipped, the mount itself always counts.
    """
    folders: list[Path] = []
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / controllers if controllers else root
        if controllers and not mount.is_dir():
            mount = root / controller
        inside = mount / path.lstrip("/")
        folders += [f for f in (inside, *inside.parents) if f.is_relative_to(mount) and f.is_dir()]
    return folders


def _quota(folder: Path) -> float | None:
    """Cores allowed by ``cpu.max`` (v2: quota and period, microseconds) or ``cpu.cfs_*`` (v1)."""
    parts = _text(folder / "cpu.max").split()
    if len(parts) == 2 and parts[0].isdigit():
        return int(parts[0]) / int(parts[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _reclaimable(stat: Path) -> int:
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(stat), re.MULTILINE)
    return int(found.group(1)) if found else 0


def _number(path: Path) -> int | None:
    """The non-negative integer that a file holds; None for ``max``, -1 or no file."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
