"""``compress measure``: a package, a model, an endpoint, and what is none of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compressor.engines.measure import measure
from compressor.engines.onnx_package import DATA_FILE, write_package
from compressor.engines.onnx_store import Export
from compressor.errors import InputError, PackageError, UnfitMachineError
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import SubNetwork

WORKLOAD = Workload(prompt_tokens=16, output_tokens=8, concurrency=2)


@pytest.fixture(scope="module")
def package(tiny_export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "package"
    subnet = SubNetwork((0, 2, 3), (128, 64, 32))
    write_package(tiny_export, subnet, folder, {"name": "tiny", "base_model": "tiny"})
    return folder


@pytest.fixture(scope="module")
def server(package: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serve", str(package), "--port", str(port), "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                pytest.fail(f"the server ended with {process.returncode}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.25)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def assert_plausible(measured: Measurement) -> None:
    assert measured.ttft_ms > 0 and measured.tpot_ms > 0
    assert measured.ttft_p90_ms >= measured.ttft_ms
    rounds_s = (measured.ttft_ms + 7 * measured.tpot_ms) / 1e3
    assert measured.throughput_tok_s == pytest.approx(2 * 8 / rounds_s, rel=0.6)


def test_a_package(package: Path) -> None:
    measured = measure(str(package), WORKLOAD, threads=1, max_seconds=0.3)
    assert_plausible(measured)
    assert measured.peak_memory_bytes > 0
    assert measured.conditions["numerics"] == "int8" and measured.conditions["threads"] == 1


def test_a_model_in_pytorch(tiny_model_folder: Path) -> None:
    measured = measure(str(tiny_model_folder), WORKLOAD, max_seconds=0.3)
    assert_plausible(measured)
    assert measured.conditions["numerics"] == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_model_for_a_gpu_that_is_not_there(tiny_model_folder: Path) -> None:
    with pytest.raises(UnfitMachineError, match="torch sees none"):
        measure(str(tiny_model_folder), WORKLOAD, on="cuda")


def test_an_endpoint_through_http(server: str) -> None:
    measured = measure(server, WORKLOAD, max_seconds=0.5)
    assert_plausible(measured)
    assert measured.conditions["model"]


def test_the_same_from_the_command_line(server: str, tmp_path: Path) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text(
        'name = "mine"\n[device]\nkind = "cpu"\nmemory_gib = 1\n'
        "[budgets]\nmemory_gib = 1\nttft_ms = 60000\ntpot_ms = 60000\n"
        "[workload]\nprompt_tokens = 16\noutput_tokens = 8\n"
    )
    options = ["--profile", str(profile), "--seconds", "0.5", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "compressor.cli", "measure", "--url", server, *options],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    figures = json.loads(done.stdout)
    assert figures["ttft_ms"] > 0 and figures["tpot_ms"] > 0 and figures["conditions"]["model"]


def test_a_damaged_package_is_not_measured(package: Path, tmp_path: Path) -> None:
    for path in package.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / DATA_FILE).write_bytes((package / DATA_FILE).read_bytes()[:-1])
    with pytest.raises(PackageError, match=DATA_FILE):
        measure(str(tmp_path), WORKLOAD)


def test_a_workload_beyond_the_context_is_refused(package: Path) -> None:
    with pytest.raises(InputError, match="context"):
        measure(str(package), Workload(prompt_tokens=600, output_tokens=8))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compress serve"):
        measure("http://127.0.0.1:9", WORKLOAD)
    with pytest.raises(InputError):
        measure(str(tmp_path), WORKLOAD)
