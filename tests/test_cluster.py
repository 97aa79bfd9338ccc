"""A Ray cluster of two local nodes, one of them the profile's device: figures come from that one only."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compressor import cluster
from compressor.cluster import Cluster, join, joined, resource_name
from compressor.engines.onnx_export import export
from compressor.engines.onnx_store import Export
from compressor.errors import InputError, UnfitMachineError
from compressor.profile import Workload
from compressor.space import SubNetwork

DEVICE = "toy-board"
WORKLOAD = Workload(prompt_tokens=16, output_tokens=4)
SUBNETS = [SubNetwork((0, 3), (64, 32), (8, 4)), SubNetwork((0, 1), (128, 64)), SubNetwork((2,), (32,))]


def test_a_node_needs_no_torch() -> None:
    code = (
        "import sys; from compressor import cluster, device; import compressor.engines.onnxruntime; "
        "device.detect(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_joining_is_a_plain_ray_start() -> None:
    command = join("10.0.0.1:6379", "raspberry-pi-5")
    assert command[3:6] == ["start", "--address", "10.0.0.1:6379"]
    assert '{"profile/raspberry-pi-5": 1}' in command


def test_no_ray_is_told_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UnfitMachineError, match=r"pip install 'edge-compressor\[ray\]'"),
        joined("127.0.0.1:6379", DEVICE),
    ):
        pass


@pytest.fixture(scope="module")
def exported(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export(tiny_model_folder, tmp_path_factory.mktemp("export") / "export", (8, 4))


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """Two local Ray nodes, the second of them the device."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as LocalCluster

    local = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        local.add_node(num_cpus=1, resources={resource_name(DEVICE): 1})
        yield local
    finally:
        local.shutdown()


@pytest.fixture
def device_node(ray_cluster: Any) -> Iterator[Cluster]:
    with joined(ray_cluster.address, DEVICE) as found:
        yield found


@pytest.mark.slow
def test_figures_come_from_the_device_only_and_weights_travel_once(
    device_node: Cluster,
    exported: Export,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "CHUNK_BYTES", 4096)
    (node,) = device_node.nodes()
    assert device_node.device()
    written = []
    for subnet in SUBNETS:
        measured = device_node.bench(exported.folder, subnet, WORKLOAD, threads=1, max_seconds=0.2)
        assert measured.ttft_ms > 0 and measured.tpot_ms > 0
        assert measured.conditions["node"] == node
        received = Path(tempfile.gettempdir()).glob(f"edge-compressor-*/{_digest(device_node)}/weights.bin")
        written += [path.stat().st_mtime_ns for path in received]
    assert len(written) == len(SUBNETS) and len(set(written)) == 1


@pytest.mark.slow
def test_an_error_there_is_an_error_here(device_node: Cluster, exported: Export) -> None:
    with pytest.raises(InputError, match="context"):
        device_node.bench(exported.folder, SUBNETS[0], Workload(prompt_tokens=600, output_tokens=4))


@pytest.mark.slow
def test_a_profile_that_no_node_carries_is_named(ray_cluster: Any) -> None:
    with (
        pytest.raises(UnfitMachineError, match="another-board"),
        joined(ray_cluster.address, "another-board"),
    ):
        pass


def _digest(found: Cluster) -> str:
    (sent,) = found._sent.values()
    return str(sent["digest"])
