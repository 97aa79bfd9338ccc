"""A Ray cluster of two local nodes, one of them the profile's device: figures come from that one only."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from compressor import cluster
from compressor.cluster import Cluster, join, joined, resource_name
from compressor.engines.onnx_export import export
from compressor.engines.onnx_store import Export
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.errors import InputError, UnfitMachineError
from compressor.int8_cache import SCALES_FILE
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import SubNetwork

DEVICE = "toy-board"
WORKLOAD = Workload(prompt_tokens=16, output_tokens=4)
HEAVY = Workload(prompt_tokens=480, output_tokens=4, concurrency=128)
"""Long prompts, many at once, so that a measurement takes several seconds."""
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
        pytest.raises(UnfitMachineError, match=r"pip install -e '\.\[ray\]'"),
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
def test_scales_of_the_cache_go_to_the_node_too(device_node: Cluster, exported: Export) -> None:
    workload = WORKLOAD.model_copy(update={"kv_cache": "int8"})
    device_node.bench(exported.folder, SUBNETS[0], WORKLOAD, threads=1, max_seconds=0.1)
    OnnxRuntimeEngine(exported.folder, kv_cache="int8").require_scales()  # once a node had the weights
    made = (exported.folder / SCALES_FILE).read_bytes()
    measured = device_node.bench(exported.folder, SUBNETS[0], workload, threads=1, max_seconds=0.1)
    assert measured.conditions["kv_cache"] == "int8"
    (received,) = Path(tempfile.gettempdir()).glob(f"edge-compressor-*/{_digest(device_node)}/{SCALES_FILE}")
    assert received.read_bytes() == made


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


@pytest.mark.slow
def test_a_node_that_drops_out_mid_measurement_is_replaced_or_reported(
    ray_cluster: Any, exported: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "GRACE_SECONDS", 2.0)
    resource = resource_name("frail-board")

    def add() -> Any:
        return ray_cluster.add_node(num_cpus=1, resources={resource: 1})

    with joined(ray_cluster.address, DEVICE), ThreadPoolExecutor(1) as pool:
        found = Cluster("frail-board")

        def measuring() -> Future[Measurement]:
            _wait_until(lambda: _has_free(resource))
            task = pool.submit(found.bench, exported.folder, SUBNETS[0], HEAVY, threads=1, max_seconds=8.0)
            _wait_until(lambda: not _has_free(resource))
            time.sleep(4.0)
            assert not task.done()
            return task

        first = add()
        lost = measuring()
        second = add()
        ray_cluster.remove_node(first, allow_graceful=False)
        assert lost.result(120).conditions["node"] == second.node_id != first.node_id
        lost = measuring()
        ray_cluster.remove_node(second, allow_graceful=False)
        with pytest.raises(UnfitMachineError, match=r"frail-board.*nothing was measured"):
            lost.result(120)


def _has_free(resource: str) -> bool:
    """Whether a node still has the resource to give, that is, measures nothing now."""
    import ray

    return bool(ray.available_resources().get(resource, 0))


def _wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _digest(found: Cluster) -> str:
    (sent,) = found._sent.values()
    return str(sent["digest"])
