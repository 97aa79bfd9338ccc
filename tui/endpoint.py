"""The endpoint that the wizard starts to try a package, and a client that streams a chat from it."""

from __future__ import annotations

import http.client
import json
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from compressor.environments import python_for
from compressor.errors import InputError, PackageError

HOST = "127.0.0.1"
START_SECONDS = 600.0  # vLLM compiles
ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Reply:
    """A piece of an answer with the figures so far: time to first token, tokens a second after it."""

    text: str
    ttft_ms: float
    tokens: int
    tok_s: float


class Endpoint:
    """A server process of one package. ``start`` returns at once; ``wait_ready`` blocks."""

    def __init__(self, package: Path, port: int, key: str) -> None:
        self.package = package
        self.port = port
        self.key = key
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def start(self) -> None:
        """Start the server. Raises ``InputError`` if the port is taken."""
        refuse_taken_port(self.port)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [str(python_for(self.package)), "-P", "-m", "tui.tethered", *self.serve_arguments()],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def serve_arguments(self) -> list[str]:
        """``serve`` and its flags, as a command line has them."""
        key = ["--api-key", self.key] if self.key else []
        return ["serve", str(self.package), "--host", HOST, "--port", str(self.port), *key]

    def wait_ready(self) -> None:
        """Return when it answers. Raises ``PackageError`` with its last words if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not self.alive:
                raise PackageError(f"the endpoint stopped: {self.last_words()}")
            if self._healthy():
                return
            time.sleep(0.1)
        raise PackageError(f"the endpoint was not ready within {START_SECONDS:.0f} s: {self.last_words()}")

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def memory_bytes(self) -> int | None:
        """Resident memory of the server."""
        if self._process is None:
            return None
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return None

    def last_words(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        lines = [
            line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()
        ]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1]

    def stop(self) -> None:
        """End the server, patiently and then not."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def curl_line(self, model: str) -> str:
        """A line for a shell that asks one question."""
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
        key = f" -H {shlex.quote(f'Authorization: Bearer {self.key}')}" if self.key else ""
        return (
            f"curl {self.url}/chat/completions -H 'Content-Type: application/json'{key} "
            f"-d {shlex.quote(json.dumps(body))}"
        )

    def chat(
        self, model: str, messages: list[dict[str, str]], stopped: Callable[[], bool]
    ) -> Iterator[Reply]:
        """The answer as it is written. Raises ``PackageError`` with the server's message."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_SECONDS)
        body = {"model": model, "messages": messages, "stream": True, "max_tokens": 512}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        began = time.monotonic()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise PackageError(f"the endpoint refused: {error_text(response.read())}")
            yield from timed(deltas(response), began, stopped)
        except (OSError, http.client.HTTPException) as error:
            raise PackageError(f"the endpoint broke off: {error}") from error
        finally:
            connection.close()

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def refuse_taken_port(port: int) -> None:
    """Raise ``InputError`` if nobody can listen there."""
    if not 1 <= port <= 65535:
        raise InputError(f"port {port} does not exist: give one from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"port {port} cannot be used ({error.strerror}): choose another one") from error


def timed(pieces: Iterator[str], began: float, stopped: Callable[[], bool]) -> Iterator[Reply]:
    """The pieces of an answer with the figures so far; ends early once ``stopped`` says so."""
    first = 0.0
    for tokens, text in enumerate(pieces, start=1):
        now = time.monotonic()
        first = first or now
        rate = (tokens - 1) / (now - first) if now > first else 0.0
        yield Reply(text, (first - began) * 1000, tokens, rate)
        if stopped():
            return


def deltas(response: http.client.HTTPResponse) -> Iterator[str]:
    """The text of every piece that the server sends."""
    for raw in response:
        line = raw.decode(errors="replace").strip()
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise PackageError(f"the endpoint failed: {event['error'].get('message', event['error'])}")
        for choice in event.get("choices", []):
            if text := choice.get("delta", {}).get("content"):
                yield text


def error_text(body: bytes) -> str:
    """The message in an error of OpenAI's shape, or the body itself."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]
