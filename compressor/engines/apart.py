"""Measuring in a process of its own: true peak memory, no other threads, and a crash that is survived.

The process needs onnxruntime and this package, not torch: ``python -m compressor.engines.apart`` reads
one request as JSON from its standard input and writes one measurement as JSON to its standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.errors import (
    CompressorError,
    InputError,
    MemoryExhaustedError,
    UnfitMachineError,
    WorkerDiedError,
)
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import Numerics, SubNetwork

START_SECONDS = 120.0
"""Time allowed beyond the measuring itself, for starting and loading."""


@dataclass(frozen=True)
class BenchRequest:
    """One measurement that another process is asked for: what of which sub-network, on which workload."""

    subnet: SubNetwork
    workload: Workload
    numerics: Numerics = "int8"
    threads: int | None = None
    max_seconds: float = 10.0
    fine_inputs: Sequence[str] = ()

    @property
    def allowed_seconds(self) -> float:
        """What the measuring itself may take, warm-up, building and repeats included."""
        return 20 * self.max_seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        fields = {field: getattr(self, field) for field in ("numerics", "threads", "max_seconds")}
        subnet, workload = self.subnet.to_dict(), self.workload.model_dump()
        return {"subnet": subnet, "workload": workload, "fine_inputs": list(self.fine_inputs), **fields}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> BenchRequest:
        subnet = SubNetwork.from_dict(found["subnet"])
        workload = Workload.model_validate(found["workload"])
        return cls(**{**found, "subnet": subnet, "workload": workload})


def bench_apart(
    export_folder: Path,
    subnet: SubNetwork,
    workload: Workload,
    *,
    numerics: Numerics = "int8",
    threads: int | None = None,
    max_seconds: float = 10.0,
    fine_inputs: Sequence[str] = (),
) -> Measurement:
    """As ``OnnxRuntimeEngine.bench``, in a fresh process; peak memory is that process's own growth.

    Raises ``InputError`` or ``UnfitMachineError``, also where the process was killed, as the kernel
    does when memory runs out.
    """
    request = BenchRequest(subnet, workload, numerics, threads, max_seconds, fine_inputs)
    seconds = START_SECONDS + request.allowed_seconds
    command = [sys.executable, "-m", "compressor.engines.apart"]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            command,
            input=json.dumps({"export": str(export_folder.resolve()), "request": request.to_dict()}),
            capture_output=True,
            text=True,
            cwd=root,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise UnfitMachineError(
            f"measuring {subnet.digest} took more than {seconds:.0f} s: "
            "free the machine, or shorten the workload"
        ) from None
    return _answer(done, subnet)


def answer(export_folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """One measurement of a ``BenchRequest``, or the error that it ended with, for ``measurement_of``."""
    from compressor.engines.onnxruntime import OnnxRuntimeEngine

    request = BenchRequest.from_dict(asked)
    try:
        engine = OnnxRuntimeEngine(export_folder, request.threads, kv_cache=request.workload.kv_cache)
        candidate = engine.build(request.subnet, request.numerics, request.fine_inputs)
        return asdict(engine.bench(candidate, request.workload, max_seconds=request.max_seconds))
    except CompressorError as error:
        return error_of(error)


def error_of(error: CompressorError) -> dict[str, Any]:
    """An answer that says why there is no measurement."""
    return {"error": str(error), "kind": type(error).__name__}


def measurement_of(answer: Mapping[str, Any]) -> Measurement:
    """The measurement in an answer. Raises ``InputError`` or an ``UnfitMachineError`` for an error."""
    if "error" in answer:
        raise _KINDS.get(answer["kind"], UnfitMachineError)(answer["error"])
    return Measurement(**answer)


_KINDS: Mapping[str, type[CompressorError]] = {
    kind.__name__: kind for kind in (InputError, MemoryExhaustedError, WorkerDiedError)
}


def main() -> int:
    """Answer one request."""
    asked = json.load(sys.stdin)
    print(json.dumps(answer(Path(asked["export"]), asked["request"])))
    return 0


def _answer(done: subprocess.CompletedProcess[str], subnet: SubNetwork) -> Measurement:
    lines = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if found.keys() & {"error", "ttft_ms"}:
        return measurement_of(found)
    reason = "was killed, perhaps for want of memory" if done.returncode < 0 else _last(done.stderr)
    raise UnfitMachineError(f"the process that measured {subnet.digest} {reason}: free memory and try again")


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return f"ended with: {lines[-1]}" if lines else "ended without a word"


if __name__ == "__main__":
    sys.exit(main())
