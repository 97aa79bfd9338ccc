"""Ask a package one question through its real endpoint: start the server, ask over HTTP, stop it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.errors import PackageError
from compressor.manifest import read_manifest

START_SECONDS = 60.0
ANSWER_SECONDS = 300.0


def ask_package(package: Path, question: str, max_tokens: int = 64) -> str:
    """The package's answer to a chat question. Raises ``PackageError`` if it does not serve."""
    manifest = read_manifest(package)
    with running_server(package) as url:
        body = {
            "model": manifest.name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        answer = post_json(f"{url}/v1/chat/completions", body)
    return str(answer["choices"][0]["message"]["content"])


@contextmanager
def running_server(package: Path) -> Iterator[str]:
    """The URL of a server that runs for the length of the block, on a free loopback port."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "serve", str(package), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(server, url, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            log.seek(0)
            last = log.read().strip().splitlines()[-1:] or ["no output"]
            raise PackageError(f"the server stopped while starting: {last[0]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise PackageError(f"the server was not ready within {START_SECONDS:.0f} s")


def post_json(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
            return dict(json.load(reply))
    except urllib.error.HTTPError as error:
        raise PackageError(
            f"the server refused the question: {error.read().decode(errors='replace')}"
        ) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
