"""The process that measures in vLLM: what it answers and how it fails, in a Python without vLLM."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from compressor.engines.vllm_worker import VllmWorker
from compressor.errors import InputError, UnfitMachineError
from compressor.profile import Workload
from compressor.space import SubNetwork

SUBNET = SubNetwork((0, 1), (128, 64))
WORKLOAD = Workload(prompt_tokens=16, output_tokens=4)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is in this environment")
def test_it_says_that_vllm_is_missing_and_goes_on(tiny_model_folder: Path) -> None:
    worker = VllmWorker(Path(sys.executable))
    try:
        for _ in range(2):
            with pytest.raises(UnfitMachineError, match="measuring in vLLM needs it installed"):
                worker.bench(tiny_model_folder, SUBNET, WORKLOAD)
        with pytest.raises(InputError, match="fp16"):
            worker.bench(tiny_model_folder, SUBNET, WORKLOAD, numerics="fp16")
    finally:
        worker.close()


def test_one_that_dies_is_told_with_its_last_words(tmp_path: Path, tiny_model_folder: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 3\n")
    python.chmod(0o755)
    worker = VllmWorker(python)
    for _ in range(2):
        with pytest.raises(UnfitMachineError, match="ended with: no such thing"):
            worker.bench(tiny_model_folder, SUBNET, WORKLOAD)


def test_one_that_is_killed_is_told_so(tmp_path: Path, tiny_model_folder: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nread line\nkill -9 $$\n")
    python.chmod(0o755)
    with pytest.raises(UnfitMachineError, match="was killed, perhaps for want of memory"):
        VllmWorker(python).bench(tiny_model_folder, SUBNET, WORKLOAD)
