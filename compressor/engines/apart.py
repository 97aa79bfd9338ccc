"""Measuring in a process of its own: true peak memory, no other threads, and a crash that is survived.

The process needs onnxruntime and this package, not torch: ``python -m compressor.engines.apart`` reads
one request as JSON from its standard input and writes one measurement as JSON to its standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError, InputError, UnfitMachineError
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import Numerics, SubNetwork

START_SECONDS = 120.0
"""Time allowed beyond the measuring itself, for starting and loading."""


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
    request = request_text(subnet, workload, numerics, threads, max_seconds, fine_inputs)
    command = [sys.executable, "-m", "compressor.engines.apart"]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            command,
            input=json.dumps({"export": str(export_folder.resolve()), "request": request}),
            capture_output=True,
            text=True,
            cwd=root,
            timeout=START_SECONDS + 20 * max_seconds,
        )
    except subprocess.TimeoutExpired:
        raise UnfitMachineError(
            f"measuring {subnet.digest} took more than {START_SECONDS + 20 * max_seconds:.0f} s: "
            "free the machine, or shorten the workload"
        ) from None
    return _answer(done, subnet)


def request_text(
    subnet: SubNetwork,
    workload: Workload,
    numerics: Numerics,
    threads: int | None,
    max_seconds: float,
    fine_inputs: Sequence[str],
) -> str:
    """What ``answer`` is asked, as JSON."""
    return json.dumps(
        {
            "subnet": subnet.to_dict(),
            "workload": workload.model_dump(),
            "numerics": numerics,
            "threads": threads,
            "max_seconds": max_seconds,
            "fine_inputs": list(fine_inputs),
        }
    )


def answer(export_folder: Path, text: str) -> dict[str, Any]:
    """One measurement of a ``request_text``, or the error that it ended with, for ``measurement_of``."""
    from compressor.engines.onnxruntime import OnnxRuntimeEngine

    request = json.loads(text)
    try:
        engine = OnnxRuntimeEngine(export_folder, request["threads"])
        subnet = SubNetwork.from_dict(request["subnet"])
        candidate = engine.build(subnet, request["numerics"], request["fine_inputs"])
        workload = Workload.model_validate(request["workload"])
        return asdict(engine.bench(candidate, workload, max_seconds=request["max_seconds"]))
    except CompressorError as error:
        return {"error": str(error), "kind": type(error).__name__}


def measurement_of(answer: Mapping[str, Any]) -> Measurement:
    """The measurement in an answer. Raises ``InputError`` or ``UnfitMachineError`` for an error."""
    if "error" in answer:
        raise (InputError if answer["kind"] == "InputError" else UnfitMachineError)(answer["error"])
    return Measurement(**answer)


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
