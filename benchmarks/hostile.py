"""What one hostile client costs the others: the streams' longest gap and how long others wait.

A server of the unpruned starter, a stream that runs all the time, a client that asks for /health and one
that asks for a short chat; beside them, one after the other, what a hostile client may send: texts, bodies
and schemas that take long to read, half-open connections, and a SIGTERM during a stream. Prints a table,
then the bounds; exit 1 if one is not met.

    python benchmarks/hostile.py [PACKAGE] [--seconds 8] [--code DIR] [--only NAME]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rivals import ROOT, our_package
from verdict import Bound, conclude

LONGEST_SECONDS = 1.0
"""Of a wait for /health and of a stream's gap; what holds the interpreter for 50 ms shows as much more beside
a model that computes on all cores, and neighbours on a shared machine show too."""
LONGEST_CHAT_SECONDS = 5.0
CONNECTIONS = 1030
DRAIN_SECONDS = 30.0
CHAT = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 8, "temperature": 0}


@dataclass
class Waits:
    """The longest of each kind, seconds, and what the hostile client was told."""

    gap: float = 0.0
    health: float = 0.0
    chat: float = 0.0
    answers: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, nargs="?", help="default: the unpruned starter")
    parser.add_argument("--seconds", type=float, default=8, help="that each attack is watched at least")
    parser.add_argument("--most", type=float, default=60, help="that each attack is watched at most")
    parser.add_argument("--code", type=Path, default=ROOT, help="clone whose server is attacked")
    parser.add_argument("--only", help="name of one attack")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    cache = ROOT / "runs" / "bench-serve"
    cache.mkdir(parents=True, exist_ok=True)
    package = (options.package or our_package(cache)).resolve()
    attacks = {name: attack for name, attack in ATTACKS.items() if options.only in (None, name)}
    with _server(package, options) as (port, _):
        rows = {name: _watch(port, attack, options) for name, attack in attacks.items()}
    figures = {name: vars(row) for name, row in rows.items()}
    _print(rows)
    bounds = [bound for name, row in rows.items() for bound in _bounds(name, row)]
    if options.only in (None, "SIGTERM"):
        stopped, whole = _stop_during_a_stream(package, options)
        print(f"SIGTERM during a stream: gone after {stopped:.1f} s, ended with an error and [DONE]: {whole}")
        bounds += [
            Bound("SIGTERM: seconds until it is gone", stopped, DRAIN_SECONDS + 2),
            Bound("SIGTERM: stream ended whole", float(whole), 1, at_most=False),
        ]
        figures["SIGTERM"] = {"seconds": stopped, "whole": whole}
    return conclude(bounds, figures)


def _bounds(name: str, row: Waits) -> Iterator[Bound]:
    yield Bound(f"{name}: longest gap, s", row.gap, LONGEST_SECONDS)
    yield Bound(f"{name}: /health, s", row.health, LONGEST_SECONDS)
    yield Bound(f"{name}: a chat, s", row.chat, LONGEST_CHAT_SECONDS)


def _print(rows: dict[str, Waits]) -> None:
    print(f"{'':34s} {'longest gap':>12s} {'/health':>9s} {'a chat':>9s}  answered")
    for name, row in rows.items():
        told = ", ".join(dict.fromkeys(row.answers))[:60]
        print(f"{name:34s} {row.gap:10.2f} s {row.health:7.2f} s {row.chat:7.2f} s  {told}")


def _watch(port: int, attack: Callable[[int], list[str]], options: argparse.Namespace) -> Waits:
    """The others' longest waits from shortly before the attack until some time after its answers."""
    waits, over = Waits(), threading.Event()
    others = [
        threading.Thread(target=_stream, args=(port, waits, over)),
        threading.Thread(target=_repeat, args=(port, waits, "health", over)),
        threading.Thread(target=_repeat, args=(port, waits, "chat", over)),
    ]
    for other in others:
        other.start()
    time.sleep(1)
    began = time.monotonic()

    def run() -> None:
        waits.answers.extend(attack(port))

    attacker = threading.Thread(target=run, daemon=True)
    attacker.start()
    attacker.join(options.most)
    time.sleep(max(1.0, options.seconds - (time.monotonic() - began)))
    over.set()
    for other in others:
        other.join(options.most)
    return waits


def _stream(port: int, waits: Waits, over: threading.Event) -> None:
    """Streams, one after the other; the longest time between two tokens counts."""
    body = {**CHAT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    while not over.is_set():
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection, reply = _post(port, "/v1/chat/completions", json.dumps(body).encode())
            last = None
            for _ in iter(reply.readline, b""):
                now = time.monotonic()
                waits.gap = max(waits.gap, now - last) if last else waits.gap
                last = now
                if over.is_set():
                    break
            connection.close()


def _repeat(port: int, waits: Waits, kind: str, over: threading.Event) -> None:
    while not over.is_set():
        began = time.monotonic()
        status = 0
        try:
            if kind == "health":
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
                connection.request("GET", "/health")
                reply = connection.getresponse()
            else:
                connection, reply = _post(port, "/v1/chat/completions", json.dumps(CHAT).encode())
            status = reply.status
            reply.read()
            connection.close()
        except (OSError, http.client.HTTPException):
            status = 0
        seconds = time.monotonic() - began if status == 200 else 999.0  # refused counts as never
        setattr(waits, kind, max(getattr(waits, kind), seconds))
        time.sleep(0.05)


def _post(
    port: int, path: str, body: bytes, seconds: float = 120
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def _ask(port: int, path: str, body: bytes, seconds: float = 120) -> str:
    try:
        connection, reply = _post(port, path, body, seconds)
        reply.read()
        connection.close()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    return str(reply.status)


def _digits(port: int) -> list[str]:
    body = {**CHAT, "messages": [{"role": "user", "content": "1234567890" * 390_000}]}
    return [_ask(port, "/v1/chat/completions", json.dumps(body).encode())]


def _dense(port: int) -> list[str]:
    body = b'{"prompt": [' + b"[]," * 1_300_000 + b"[]]}"
    return [_ask(port, "/v1/completions", body)]


def _schema(properties: int) -> bytes:
    names = {f"p{index}": {"type": "string"} for index in range(properties)}
    return _formatted({"type": "object", "properties": names, "additionalProperties": False})


def _formatted(schema: dict[str, Any], **fields: Any) -> bytes:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return json.dumps({**CHAT, "response_format": form, **fields}).encode()


def _optional(port: int) -> list[str]:
    return [_ask(port, "/v1/chat/completions", _schema(4_000))]


def _abandoned(port: int) -> list[str]:
    """Six clients that ask for what takes minutes and leave after a moment."""
    for number in range(6):
        _ask(port, "/v1/chat/completions", _schema(10_000 + number), seconds=0.5)
    return ["left"]


def _enum(port: int) -> list[str]:
    schema = {"enum": [f"value number {index}" for index in range(20_000)]}
    return [_ask(port, "/v1/chat/completions", _formatted(schema, n=16))]


def _logprobs(port: int) -> list[str]:
    body = {"prompt": "word " * 900, "echo": True, "logprobs": 20, "max_tokens": 1}
    return [_ask(port, "/v1/completions", json.dumps(body).encode())]


def _half_open(port: int) -> list[str]:
    """Connections with half a head; kept for as long as the server lets them."""
    connections, refused = [], 0
    for _ in range(CONNECTIONS):
        connection = socket.socket()
        connection.settimeout(5)
        try:
            connection.connect(("127.0.0.1", port))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            connections.append(connection)
        except OSError:
            refused += 1
    time.sleep(15)
    left = sum(_is_open(connection) for connection in connections)
    for connection in connections:
        connection.close()
    return [f"{left} of {CONNECTIONS} open after 15 s"]


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        connection.recv(1)  # an answer, or the end
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _quiet(_: int) -> list[str]:
    return ["nothing"]


ATTACKS: dict[str, Callable[[int], list[str]]] = {
    "nobody": _quiet,
    "3.9 million digits": _digits,
    "1.3 million empty lists": _dense,
    "schema, 4,000 optional": _optional,
    "6 schemas, 10,000 optional, left": _abandoned,
    "enum of 20,000, n = 16": _enum,
    "echo with log-probabilities": _logprobs,
    "1,030 half-open connections": _half_open,
}


def _stop_during_a_stream(package: Path, options: argparse.Namespace) -> tuple[float, bool]:
    """Seconds from SIGTERM to the end, and whether the stream ended with an error event and [DONE]."""
    with _server(package, options) as (port, server):
        body = {**CHAT, "max_tokens": 1_900, "stream": True, "ignore_eos": True, "n": 8}
        _, reply = _post(port, "/v1/chat/completions", json.dumps(body).encode())
        reply.readline()
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError, http.client.HTTPException):
            text = reply.read()
        server.wait(120)
        seconds = time.monotonic() - began
    return seconds, b'"error"' in text and text.endswith(b"data: [DONE]\n\n")


@contextlib.contextmanager
def _server(package: Path, options: argparse.Namespace) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-P", "-m", "serve", str(package), "--port", str(port)]
    flags = ["--threads", str(options.threads), "--max-context", "2048", "--cache-gib", "0.5"]
    environment = os.environ | {"PYTHONPATH": str(options.code.resolve())}
    server = subprocess.Popen(
        [*command, *flags], cwd=options.code, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        _wait(server, port)
        yield port, server
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(5)
        server.kill()
        server.wait()


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit("the server stopped while starting")
        if _answers(port):
            return
        time.sleep(0.1)
    raise SystemExit("the server did not start")


def _answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
