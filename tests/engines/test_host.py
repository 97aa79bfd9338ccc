"""Whether the host is fit to measure on."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compressor.engines import host
from compressor.engines.host import HostWatch, drivers, host_conditions, host_faults, require_free_memory
from compressor.errors import UnfitMachineError


def test_a_quiet_roomy_host_has_no_load_or_memory_fault() -> None:
    faults = host_faults(2**30, busy_share=lambda: 0.02, available_bytes=lambda: 2**33)
    assert not [f for f in faults if "memory" in f or "processes" in f]


def test_each_fault_is_named() -> None:
    faults = host_faults(3 * 2**30, busy_share=lambda: 0.5, available_bytes=lambda: 2**30)
    assert any("50%" in fault for fault in faults)
    assert any("1.0 GiB" in fault and "3.0" in fault for fault in faults)


def test_another_process_is_noticed_and_the_figure_marked() -> None:
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)
        watch = HostWatch()
        time.sleep(0.5)
        marks = watch.marks()
    finally:
        burner.kill()
        burner.wait()
    assert marks["others_share"] > 0.1
    assert any("other processes" in reason for reason in marks["unfit"])


def test_too_little_free_memory_is_found_before_anything_is_loaded() -> None:
    require_free_memory(2**30, available_bytes=lambda: 2**31)
    with pytest.raises(UnfitMachineError, match=r"3.00 GiB.*1.00 GiB"):
        require_free_memory(3 * 2**30, available_bytes=lambda: 2**30)


def test_a_clock_that_jumps_marks_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = HostWatch()
    real = time.time
    monkeypatch.setattr(host.time, "time", lambda: real() + 3600)
    assert any("clock jumped by +3600 s" in reason for reason in watch.marks()["unfit"])


def test_conditions_name_the_device_and_its_drivers() -> None:
    conditions = host_conditions()
    assert conditions["device"] and conditions["cores"]
    assert conditions["kernel"] == f"{platform.system()} {platform.release()}"


def test_the_driver_of_a_gpu_is_named_where_one_is_loaded(tmp_path: Path) -> None:
    version = tmp_path / "version"
    assert "nvidia_driver" not in drivers(version)
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 13\n"
    )
    assert drivers(version)["nvidia_driver"] == (
        "NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build"
    )
