"""A tiny random package and a real server process on a loopback port."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest

from compressor.manifest import CacheNumerics, read_manifest, record_files, write_manifest

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_NAME = "tiny-int8"
START_SECONDS = 60
TOOLS_TEMPLATE = """{% if tools %}<|im_start|>system
{{ tools | tojson }} Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}{{ message.content }}
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass
class RunningServer:
    """A server process; ``log`` grows with what it prints."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    def client(self, key: str = "unused") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def stop(self) -> int:
        """Ask it to stop; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="session")
def tiny_package(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the tiny model, unpruned, in INT8."""
    return whole_package(tiny_model_folder, tmp_path_factory.mktemp("serve"), MODEL_NAME)


@pytest.fixture(scope="session")
def narrow_package(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with keys and values in INT8."""
    return whole_package(tiny_model_folder, tmp_path_factory.mktemp("serve-int8"), MODEL_NAME, "int8")


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers with flags of the test's choice; all are stopped at the end."""
    servers: list[RunningServer] = []

    def start(package: Path, *flags: str) -> RunningServer:
        server = _start(package, flags)
        servers.append(server)
        _wait_until_ready(server)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(tiny_package: Path, start_server: Callable[..., RunningServer]) -> RunningServer:
    """One server for all tests that need nothing special."""
    return start_server(tiny_package, "--max-concurrency", "4")


@pytest.fixture(scope="session")
def changed_package(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes copies of the tiny package with another chat template, further files, another manifest."""

    def change(template: str, files: dict[str, str] | None = None, **manifest_changes: object) -> Path:
        folder = tmp_path_factory.mktemp("changed") / "package"
        shutil.copytree(tiny_package, folder)
        for name, text in {"chat_template.jinja": template, **(files or {})}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        manifest = read_manifest(folder)
        changes = {"files": record_files(folder), **manifest_changes}
        write_manifest(folder, manifest.model_copy(update=changes))
        return folder

    return change


@pytest.fixture(scope="session")
def tools_server(
    changed_package: Callable[..., Path], start_server: Callable[..., RunningServer]
) -> RunningServer:
    """A server of a model whose chat template has tools."""
    return start_server(changed_package(TOOLS_TEMPLATE))


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


def whole_package(model_folder: Path, scratch: Path, name: str, kv_cache: CacheNumerics = "fp32") -> Path:
    """A model as it is, in INT8, as a package in ``scratch``."""
    from compressor.engines.onnx_export import export
    from compressor.engines.onnxruntime import OnnxRuntimeEngine
    from compressor.space import SubNetwork

    exported = export(model_folder, scratch / "export")
    shape = exported.shape
    whole = SubNetwork(tuple(range(shape.num_layers)), (shape.intermediate_size,) * shape.num_layers)
    engine = OnnxRuntimeEngine(exported.folder, kv_cache=kv_cache)
    engine.write(whole, scratch / "package", {"name": name, "base_model": name})
    return scratch / "package"


def _start(package: Path, flags: tuple[str, ...]) -> RunningServer:
    command = [sys.executable, "-m", "serve", str(package), "--port", "0", "--threads", "1", *flags]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    server = RunningServer(process)
    threading.Thread(target=_read_log, args=(server,), daemon=True).start()
    return server


def _read_log(server: RunningServer) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.log.append(line)
        if " at http://" in line and not server.url:
            server.url = line.split(" at ")[1].split("/v1")[0]


def _wait_until_ready(server: RunningServer) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError("the server stopped: " + "".join(server.log))
        if server.url:
            with urllib.request.urlopen(f"{server.url}/health", timeout=30) as reply:
                assert reply.status == 200
                return
        time.sleep(0.05)
    raise RuntimeError("the server did not start: " + "".join(server.log))
