"""Sub-networks measured in vLLM, one after the other in one process of the Python where vLLM is.

vLLM takes many seconds to import and start, a sub-network two: so the process is kept. It reads requests as
lines of JSON from its standard input and writes an answer each to its standard output: ``python -m
compressor.engines.vllm_worker``. One that dies, as for want of memory, is started anew for the next.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from compressor.engines.apart import BenchRequest, error_of, measurement_of
from compressor.engines.children import end_child, start_child
from compressor.engines.host import out_of_memory
from compressor.environments import ROOT
from compressor.errors import CompressorError, MemoryExhaustedError, WorkerDiedError
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import Numerics, SubNetwork

START_SECONDS = 600.0
"""Time allowed beyond the measuring itself: for vLLM's imports, and for loading a large model on a GPU."""


class VllmWorker:
    """The process that measures, started by the first ``bench``. ``close`` it at the end."""

    def __init__(self, python: Path) -> None:
        self._python = python
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def bench(
        self,
        supernet: Path,
        subnet: SubNetwork,
        workload: Workload,
        *,
        numerics: Numerics = "int8",
        threads: int | None = None,
        max_seconds: float = 10.0,
        package: bool = False,
    ) -> Measurement:
        """A sub-network of the super-network in a folder, with made-up weights: its speed and memory.

        With ``package`` the folder is the sub-network's own, which is run as its server runs it.

        Raises ``InputError``, ``UnfitMachineError`` where vLLM cannot load it, ``MemoryExhaustedError`` where
        memory ran out, or ``WorkerDiedError``; after these two the next is measured by a new process.
        """
        request = BenchRequest(subnet, workload, numerics, threads, max_seconds)
        asked = {"folder": str(supernet.resolve()), "package": package, "request": request.to_dict()}
        try:
            return measurement_of(self._ask(asked, START_SECONDS + request.allowed_seconds))
        except MemoryExhaustedError:
            self.close()  # what a failed start leaves behind would lack the next
            raise

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            end_child(process)
        if self._log is not None:
            self._log.close()
            self._log = None

    def _ask(self, asked: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        line = ""
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            line = process.stdout.readline() if _readable(process.stdout, seconds) else ""
        except OSError:
            pass  # it died: the log says why
        if not line:
            reason = self._reason(seconds)
            self.close()
            raise WorkerDiedError(
                f"the vLLM that was to measure a sub-network {reason}: free memory and try again"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> subprocess.Popen[str]:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        command = [str(self._python), "-m", "compressor.engines.vllm_worker"]
        self._process = start_child(command, ROOT, self._log)
        return self._process

    def _reason(self, seconds: float) -> str:
        assert self._process is not None and self._log is not None
        if self._process.poll() is None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                return f"gave no answer within {seconds:.0f} s"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        if self._process.returncode < 0 or not lines:
            return "was killed, perhaps for want of memory"
        return f"ended with: {lines[-1]}"


def main() -> int:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM prints is no answer
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)
    return 0


def _answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    from compressor.engines.vllm import VllmEngine

    request = BenchRequest.from_dict(asked["request"])
    try:
        engine = VllmEngine(Path(asked["folder"]), request.threads)
        load = engine.open_package if asked["package"] else engine.build
        candidate = load(request.subnet, request.workload, request.numerics)
        try:
            return asdict(engine.bench(candidate, request.workload, max_seconds=request.max_seconds))
        finally:
            candidate.close()
    except CompressorError as error:
        return error_of(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise  # whatever it was, this process can't be trusted any more
        return error_of(MemoryExhaustedError(f"memory ran out while a sub-network was measured: {error}"))


def _readable(stream: IO[str], seconds: float) -> bool:
    """Whether something can be read within so long."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(seconds))


if __name__ == "__main__":
    sys.exit(main())
