"""What this machine is, read from the real one, and which profiles fit machines of all kinds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from compressor import device
from compressor.device import GIB, Gpu, Machine
from compressor.errors import UnfitMachineError
from compressor.profile import load_profile, load_profiles

LAPTOP = Machine(
    cpu_name="13th Gen Intel(R) Core(TM) i7-1360P",
    board="",
    physical_cores=12,
    logical_cores=16,
    usable_cores=16,
    isa=("avx2", "avx_vnni"),
    memory_bytes=int(15.4 * GIB),
    memory_available_bytes=8 * GIB,
    disk_free_bytes=100 * GIB,
)


def with_gpu(name: str, memory_gib: float) -> Machine:
    return replace(LAPTOP, gpus=(Gpu(name, int(memory_gib * GIB), "8.0"),))


def fitting(machine: Machine) -> set[str]:
    return {p.name for p in load_profiles() if device.fits(p, machine).ok}


def test_this_machine_is_described_from_its_own_figures(tmp_path: Path) -> None:
    machine = device.detect(tmp_path)
    assert machine.cpu_name
    assert 1 <= machine.usable_cores <= machine.logical_cores == psutil.cpu_count()
    assert 0 < machine.memory_available_bytes <= machine.memory_bytes <= psutil.virtual_memory().total
    assert machine.disk_free_bytes > 0
    facts = dict(device.describe(machine))
    assert facts["CPU"] == machine.cpu_name
    assert f"{machine.memory_bytes / GIB:.1f} GiB" in facts["memory"]


def test_detecting_a_machine_without_a_driver_imports_no_torch() -> None:
    if device.cuda_driver_present():
        pytest.skip("this machine has an NVIDIA driver")
    code = (
        "import sys, json; from compressor import device; machine = device.detect();"
        "print(json.dumps([len(machine.gpus), 'torch' in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == [0, False]


@pytest.mark.parametrize(
    ("machine", "named", "not_named"),
    [
        (LAPTOP, {"starter-cpu", "laptop-cpu"}, {"xeon-cpu", "raspberry-pi-5", "a100-40g"}),
        (replace(LAPTOP, cpu_name="Intel(R) Xeon(R) Platinum 8481C"), {"xeon-cpu"}, {"raspberry-pi-5"}),
        (replace(LAPTOP, cpu_name="AMD EPYC 9B14"), {"xeon-cpu"}, set()),
        (
            replace(LAPTOP, cpu_name="aarch64", board="raspberry pi 5 model B", memory_bytes=int(7.9 * GIB)),
            {"raspberry-pi-5", "starter-cpu"},
            {"laptop-cpu"},
        ),
        (replace(LAPTOP, cpu_name="aarch64", board="Raspberry Pi 4 Model B"), set(), {"raspberry-pi-5"}),
        (with_gpu("Tesla T4", 14.6), {"t4-16g"}, {"l4-24g"}),
        (with_gpu("NVIDIA L4", 22.0), {"l4-24g"}, {"t4-16g", "rtx-4090-24g"}),
        (with_gpu("NVIDIA L40S", 44.4), set(), {"l4-24g"}),
        (with_gpu("NVIDIA GeForce RTX 4090", 23.6), {"rtx-4090-24g"}, {"l4-24g"}),
        (with_gpu("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6), set(), {"rtx-4090-24g"}),
        (with_gpu("NVIDIA A100-SXM4-40GB", 39.4), {"a100-40g"}, {"a100-80g", "h100-80g"}),
        (with_gpu("nvidia a100 80gb pcie", 79.1), {"a100-40g", "a100-80g"}, {"h100-80g"}),
        (with_gpu("NVIDIA H100 80GB HBM3", 79.1), {"h100-80g"}, {"a100-80g"}),
        (with_gpu("Orin", 15.3), {"jetson-orin-16g"}, {"t4-16g"}),
    ],
)
def test_profiles_fit_the_devices_they_are_for(
    machine: Machine, named: set[str], not_named: set[str]
) -> None:
    found = fitting(machine)
    assert named <= found
    assert not found & not_named


@pytest.mark.parametrize(
    ("machine", "best"),
    [
        (LAPTOP, "laptop-cpu"),
        (replace(LAPTOP, memory_bytes=6 * GIB), "starter-cpu"),
        (replace(LAPTOP, cpu_name="AMD EPYC"), "xeon-cpu"),
        (with_gpu("NVIDIA A100 80GB PCIe", 79.1), "a100-80g"),
        (with_gpu("Tesla K80", 11), "laptop-cpu"),
    ],
)
def test_auto_takes_the_closest_profile(machine: Machine, best: str) -> None:
    assert device.auto(machine).name == best


def test_a_machine_too_small_for_all() -> None:
    with pytest.raises(UnfitMachineError, match="no profile fits this machine: copy one"):
        device.auto(replace(LAPTOP, memory_bytes=GIB))


def test_a_missing_gpu_is_said_in_one_line() -> None:
    with pytest.raises(UnfitMachineError) as caught:
        device.require(load_profile("a100-40g"), LAPTOP)
    assert str(caught.value) == (
        "profile 'a100-40g' needs a CUDA device with 40 GiB; this machine has none. "
        "Measure on the device itself, or pick one of: laptop-cpu, starter-cpu"
    )
    assert caught.value.exit_code == 2


def test_another_gpu_or_cpu_is_named() -> None:
    with pytest.raises(
        UnfitMachineError, match=r"named A100 with 40 GiB; this machine has Tesla T4 with 14\.6"
    ):
        device.require(load_profile("a100-40g"), with_gpu("Tesla T4", 14.6))
    with pytest.raises(
        UnfitMachineError, match=r"CPU named Raspberry Pi 5 or BCM2712 .* i7-1360P with 15\.4"
    ):
        device.require(load_profile("raspberry-pi-5"), LAPTOP)
    device.require(load_profile("laptop-cpu"), LAPTOP)


def cgroup(tmp_path: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    member = tmp_path / "self_cgroup"
    member.write_text(membership)
    return root, member


def test_memory_limit_of_cgroup_v2_is_the_tightest_around(tmp_path: Path) -> None:
    mib = 2**20
    root, member = cgroup(
        tmp_path,
        "0::/user/job\n",
        {
            "memory.max": "max\n",
            "user/memory.max": f"{300 * mib}\n",
            "user/memory.current": f"{120 * mib}\n",
            "user/memory.stat": f"anon 1\ninactive_file {20 * mib}\n",
            "user/job/memory.max": f"{400 * mib}\n",
            "user/cpu.max": "150000 100000\n",
            "user/job/cpu.max": "max 100000\n",
        },
    )
    assert device.container_memory(root, member) == (300 * mib, 100 * mib)
    assert device.container_cpus(root, member) == 1.5


def test_memory_limit_of_cgroup_v1_under_a_path_of_the_host(tmp_path: Path) -> None:
    mib = 2**20
    root, member = cgroup(
        tmp_path,
        "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n",
        {
            "memory/memory.limit_in_bytes": f"{256 * mib}\n",
            "memory/memory.usage_in_bytes": f"{64 * mib}\n",
            "memory/memory.stat": f"total_inactive_file {4 * mib}\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert device.container_memory(root, member) == (256 * mib, 60 * mib)
    assert device.container_cpus(root, member) == 0.5


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    root, member = cgroup(
        tmp_path,
        "4:memory:/\n0::/\n",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory.max": "max\n",
            "cpu.max": "max 100000",
        },
    )
    assert device.container_memory(root, member) == (None, 0)
    assert device.container_cpus(root, member) is None
    assert device.container_memory(tmp_path / "none", tmp_path / "none") == (None, 0)
