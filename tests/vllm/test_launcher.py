"""What the launcher would start, and when it refuses to. Needs no vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from compressor.engines.vllm_package import write_package
from compressor.errors import InputError, PackageError, UnfitMachineError
from compressor.manifest import BudgetVerdict, Speed, read_manifest
from serve.settings import Settings
from serve.vllm_launcher import Command, base_url, build_command, gpu_bytes, launch
from tests.vllm.conftest import FIELDS, UNEVEN


@pytest.fixture(scope="module")
def package(supernet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launcher") / "package"
    write_package(supernet, UNEVEN, folder, FIELDS)
    return folder


def test_the_key_is_not_on_the_command_line(package: Path) -> None:
    command = _command(Settings(package, api_key="sesame"))
    assert command.environment["VLLM_API_KEY"] == "sesame"
    assert "sesame" not in " ".join(command.argv)


def test_a_cpu_runs_uncompiled_on_the_threads_asked_for(package: Path) -> None:
    command = _command(Settings(package, threads=1))
    assert "--enforce-eager" in command.argv
    assert command.environment["VLLM_CPU_OMP_THREADS_BIND"] == str(min(os.sched_getaffinity(0)))


def test_a_gpu_is_left_to_vllm(package: Path) -> None:
    argv = _command(Settings(package), on_cpu=False).argv
    assert not {"--enforce-eager", "--kv-cache-memory-bytes", "--max-num-seqs"} & set(argv)
    assert "--gpu-memory-utilization" not in argv and _after(argv, "--max-model-len") == "auto"
    assert _after(argv, "--dtype") == "auto", "some GPUs have no bf16"


def test_a_gpu_takes_what_is_asked_for(package: Path) -> None:
    argv = _command(Settings(package, cache_gib=2, max_concurrency=3, max_context=64), on_cpu=False).argv
    assert _after(argv, "--kv-cache-memory-bytes") == str(2 << 30)
    assert _after(argv, "--max-num-seqs") == "3" and _after(argv, "--max-model-len") == "64"


def test_vllm_is_not_told_how_to_keep_its_cache(package: Path) -> None:
    with pytest.raises(InputError, match=r"--kv-cache is for ONNX Runtime.*leave it out"):
        _command(Settings(package, kv_cache="int8"))
    with pytest.raises(InputError, match=r"--allowed-host is for ONNX Runtime.*leave it out"):
        _command(Settings(package, allowed_hosts=("box.local",)))


@pytest.mark.vllm
def test_vllm_takes_a_gpus_flags(package: Path) -> None:
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    argv = _command(Settings(package, cache_gib=2, max_concurrency=3), on_cpu=False).argv
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags, _ = parser.parse_known_args(list(argv[3:]))
    assert (flags.max_model_len, flags.max_num_seqs, flags.kv_cache_memory_bytes) == (-1, 3, 2 << 30)
    assert flags.dtype == "auto"


@pytest.mark.parametrize(("gpu", "gib", "share"), [("A", 40, "0.850"), ("A", 36, None), ("B", 40, None)])
def test_the_memory_budget_holds_on_the_gpu_it_was_made_for(
    package: Path, gpu: str, gib: int, share: str | None
) -> None:
    manifest = read_manifest(package).model_copy(
        update={
            "speed": [Speed.model_construct(device="A")],
            "budgets": [BudgetVerdict(name="memory_gib", limit=34, measured=30, met=True)],
        }
    )
    settings = Settings(package)
    argv = build_command(manifest, _config(package), settings, on_cpu=False, gpus={gpu: gib << 30}).argv
    assert (None if share is None else _after(argv, "--gpu-memory-utilization")) == share
    assert (share is None) == ("--gpu-memory-utilization" not in argv)


def test_the_driver_tells_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-40GB, 40960'\necho 'NVIDIA GB10, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_bytes() == {"NVIDIA A100-SXM4-40GB": 40 << 30}


def test_the_cache_holds_every_concurrent_request(package: Path) -> None:
    argv = _command(Settings(package, max_concurrency=3, max_context=256)).argv
    per_token = 2 * UNEVEN.depth * 2 * 32 * 2
    assert int(_after(argv, "--kv-cache-memory-bytes")) == 3 * (256 + 128) * per_token
    assert _after(argv, "--max-model-len") == "256" and _after(argv, "--max-num-seqs") == "3"


def test_a_context_beyond_the_cache_is_refused(package: Path) -> None:
    with pytest.raises(UnfitMachineError, match="--max-context lower"):
        _command(Settings(package, cache_gib=0.0003))
    _command(Settings(package, cache_gib=0.0003, max_context=32))


def test_other_origins_are_let_in_only_when_named(package: Path) -> None:
    assert "--allowed-origins" not in _command(Settings(package)).argv
    argv = _command(Settings(package, cors_origins=("https://a.example",))).argv
    assert json.loads(_after(argv, "--allowed-origins")) == ["https://a.example"]


def test_the_address_is_one_a_client_can_reach() -> None:
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::1", 80) == "http://[::1]:80"
    assert base_url("example.org", 80) == "http://example.org:80"


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not a package"):
        launch(Settings(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_environment_without_vllm_is_told_what_to_do(package: Path) -> None:
    with pytest.raises(UnfitMachineError, match="make setup-vllm"):
        launch(Settings(package))


@pytest.mark.vllm
def test_a_taken_port_is_found_before_the_model_loads(package: Path) -> None:
    pytest.importorskip("vllm")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UnfitMachineError, match="choose another --port"),
    ):
        launch(Settings(package, port=taken.getsockname()[1]))


def _command(settings: Settings, on_cpu: bool = True) -> Command:
    manifest = read_manifest(settings.package)
    return build_command(manifest, _config(settings.package), settings, on_cpu=on_cpu)


def _config(package: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((package / "config.json").read_text())
    return config


def _after(argv: Sequence[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]
