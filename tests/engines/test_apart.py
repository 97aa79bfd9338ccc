"""Measuring in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compressor.engines import apart
from compressor.engines.apart import bench_apart
from compressor.engines.onnx_store import Export
from compressor.errors import InputError, UnfitMachineError
from compressor.profile import Workload
from compressor.space import SubNetwork

SUBNET = SubNetwork((0, 3), (64, 32), (8, 4))
WORKLOAD = Workload(prompt_tokens=16, output_tokens=4)


def test_figures_come_back(tiny_export: Export) -> None:
    measured = bench_apart(tiny_export.folder, SUBNET, WORKLOAD, threads=1, max_seconds=0.2)
    assert measured.ttft_ms > 0 and measured.tpot_ms > 0
    assert measured.peak_memory_bytes > 0
    assert measured.conditions["threads"] == 1 and "fine_inputs" not in measured.conditions


def test_matrices_that_read_their_inputs_in_two_passes_are_measured_so(tiny_export: Export) -> None:
    subnet = SubNetwork((0, 3), (64, 64))
    fine = ("head", "layers.1.down")
    measured = bench_apart(tiny_export.folder, subnet, WORKLOAD, threads=1, max_seconds=0.2, fine_inputs=fine)
    assert measured.conditions["fine_inputs"] == list(fine)


def test_measuring_needs_no_torch(tiny_export: Export) -> None:
    code = (
        "import sys; from pathlib import Path; from compressor.engines.onnxruntime import OnnxRuntimeEngine; "
        "from compressor.space import SubNetwork; "
        "OnnxRuntimeEngine(Path(sys.argv[1]), 1).build(SubNetwork((0,), (64,))); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_export.folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_error_there_is_an_error_here(tiny_export: Export) -> None:
    with pytest.raises(InputError, match="context"):
        bench_apart(tiny_export.folder, SUBNET, Workload(prompt_tokens=600, output_tokens=4))


def test_a_process_that_dies_is_survived(tiny_export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    real = subprocess.run
    monkeypatch.setattr(apart.subprocess, "run", lambda _, **options: real(dying, **options))
    with pytest.raises(UnfitMachineError, match="killed"):
        bench_apart(tiny_export.folder, SUBNET, WORKLOAD)
