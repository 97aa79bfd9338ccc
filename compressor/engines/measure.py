"""Measuring whatever a user points at: a package, a model, or a running endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.engines.memory import peak_bytes, reset_peak, resident_bytes
from compressor.errors import InputError, UnfitMachineError
from compressor.manifest import MANIFEST_NAME, Manifest, check_files, read_manifest
from compressor.measurement import Measurement
from compressor.profile import DeviceKind, Workload
from compressor.space import SubNetwork

if TYPE_CHECKING:
    import torch


def measure(
    target: str,
    workload: Workload,
    *,
    threads: int | None = None,
    max_seconds: float = 10.0,
    on: DeviceKind = "cpu",
) -> Measurement:
    """TTFT, TPOT, throughput and peak memory of ``target`` on a workload.

    ``target``: the URL of an OpenAI endpoint, the folder of a package (both measured where they are
    served), or anything that ``models.resolve`` takes, measured in bf16 in PyTorch on a device of the
    kind ``on``. Raises ``CompressorError``.
    """
    if is_url(target):
        from compressor.engines.endpoint import bench_endpoint

        return bench_endpoint(target, workload, max_seconds=max_seconds)
    if (Path(target) / MANIFEST_NAME).is_file():
        return measure_package(Path(target), workload, threads=threads, max_seconds=max_seconds)
    return _measure_model(target, workload, threads, max_seconds, on)


def is_url(target: str) -> bool:
    """Whether a target is an endpoint's address."""
    return target.startswith(("http://", "https://"))


def measure_package(
    folder: Path, workload: Workload, *, threads: int | None = None, max_seconds: float = 10.0
) -> Measurement:
    """Measure a package in the engine that serves it. Raises ``PackageError`` for a damaged one."""
    manifest = read_manifest(folder)
    total = workload.prompt_tokens + workload.output_tokens
    if total > manifest.context_length:
        raise InputError(
            f"the workload needs {total} tokens of context, {folder} has {manifest.context_length}: "
            "shorten the profile's prompt or output"
        )
    check_files(folder, manifest)
    if manifest.engine == "vllm":
        return _measure_vllm(folder, manifest, workload, threads, max_seconds)
    return _measure_onnx(folder, manifest, workload, threads, max_seconds)


def _measure_onnx(
    folder: Path, manifest: Manifest, workload: Workload, threads: int | None, max_seconds: float
) -> Measurement:
    from compressor.engines.bench import summarise, time_workload
    from compressor.engines.host import HostWatch
    from compressor.engines.onnx_session import usable_cores
    from compressor.engines.onnx_verify import open_package
    from compressor.engines.onnxruntime import OnnxRunner, session_conditions

    before, watch = resident_bytes(), HostWatch()
    reset_peak()
    session, shape = open_package(folder, threads, kv_cache=manifest.kv_cache)
    timings = time_workload(OnnxRunner(session, shape, workload), workload, max_seconds=max_seconds)
    conditions = {
        **session_conditions(session, threads or usable_cores()),
        "numerics": manifest.numerics,
        **watch.marks(),
    }
    peak = max(0, peak_bytes() - before)
    return summarise(timings, workload, peak_memory_bytes=peak, conditions=conditions)


def _measure_vllm(
    folder: Path, manifest: Manifest, workload: Workload, threads: int | None, max_seconds: float
) -> Measurement:
    from compressor.engines.vllm import VllmEngine

    engine = VllmEngine(folder, threads)
    subnet = SubNetwork.from_dict(manifest.architecture.model_dump())
    candidate = engine.open_package(subnet, workload, manifest.numerics)
    try:
        return engine.bench(candidate, workload, max_seconds=max_seconds)
    finally:
        candidate.close()


def _measure_model(
    target: str, workload: Workload, threads: int | None, max_seconds: float, on: DeviceKind
) -> Measurement:
    import torch

    from compressor import models
    from compressor.engines.pytorch import bench_pytorch

    source = models.resolve(target)
    if on == "cuda" and not torch.cuda.is_available():
        raise UnfitMachineError(
            f"{target} is to be measured on a GPU and torch sees none: `compress doctor` says why; "
            "a profile of a CPU measures it on this machine's"
        )
    if threads:
        torch.set_num_threads(threads)
    model = models.load(source, _dtype(on)).model
    try:
        return bench_pytorch(model.to(on), workload, max_seconds=max_seconds)
    except torch.OutOfMemoryError:
        raise UnfitMachineError(
            f"{target} and a workload of {workload.label} tokens do not fit the GPU's memory: "
            "shorten the profile's prompt or output, or lower its concurrency"
        ) from None


def _dtype(on: DeviceKind) -> torch.dtype:
    """bf16, or fp16 where a GPU has no bf16 (T4)."""
    import torch

    lacks_bf16 = on == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if lacks_bf16 else torch.bfloat16
