"""What a client sees of a server: streams and their times, alone, together, and beside a long prompt."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rivals import ROOT, Contender

START_SECONDS = 300
IDLE_SAMPLE_SECONDS = 0.25


class StartError(Exception):
    """A server that did not come up."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    port: int
    model: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        total = 0.0
        for process in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextmanager
def running(contender: Contender, log: Path) -> Iterator[Server]:
    """A server on a free loopback port, stopped at the end; what it prints goes to ``log``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **contender.environment}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*contender.command, "--port", str(port)], stdout=out, stderr=out, env=environment
        )
        try:
            _wait(process, contender.name, port, log)
            yield Server(contender.name, port, _model(port), psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def stream(
    server: Server, prompt: list[int], tokens: int, stop: Callable[[], bool] = lambda: False
) -> list[float]:
    """Times (``perf_counter``) of sending and of each event: about one a token, then the end.

    Leaves early once ``stop`` says so.
    """
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    times = [time.perf_counter()]
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise SystemExit(f"{server.name}: {reply.status} {reply.read()[:300]!r}")
    for line in reply:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
            if stop():
                break
    connection.close()
    return times


def together(server: Server, prompts: list[list[int]], tokens: int) -> float:
    """Output tokens a second over all streams, first request sent to last token received."""
    threads = [threading.Thread(target=stream, args=(server, prompt, tokens)) for prompt in prompts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(prompts) * tokens / (time.perf_counter() - began)


def stall(server: Server, prompt: list[int], long_prompt: list[int], before: int, most: int) -> float:
    """p99 of a stream's gaps while a long prompt is read, over the median of its gaps before.

    The long prompt is sent once the stream has ``before`` tokens; the stream has ``most`` at most.
    """
    arrivals: list[float] = []
    enough, done = threading.Event(), threading.Event()

    def watch() -> bool:
        arrivals.append(time.perf_counter())
        if len(arrivals) == before:
            enough.set()
        return done.is_set()

    reader = threading.Thread(target=stream, args=(server, prompt, most, watch))
    reader.start()
    enough.wait(600)
    sent = time.perf_counter()
    answered = stream(server, long_prompt, 1)[1]
    done.set()
    reader.join()
    gaps = [(late, late - early) for early, late in itertools.pairwise(arrivals)]
    usual = statistics.median(gap for at, gap in gaps if at <= sent)
    during = sorted(gap for at, gap in gaps if sent < at <= answered + usual)
    return during[int(0.99 * (len(during) - 1))] / usual


def until_idle(seconds: float = 5.0) -> None:
    """Wait until the machine does nothing, for so long at most.

    A server's threads may go on spinning for a second after its answer (vLLM's do), at the cost of whoever
    is measured next.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = machine_busy_seconds()
        time.sleep(IDLE_SAMPLE_SECONDS)
        if machine_busy_seconds() - before < 0.1 * IDLE_SAMPLE_SECONDS:
            return


def machine_busy_seconds() -> float:
    """CPU time of everything on the machine so far."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _wait(process: subprocess.Popen[bytes], name: str, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(f"{name} stopped while starting: see {log}")
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.1)
    raise StartError(f"{name} did not start: see {log}")


def _model(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as reply:
        return str(json.loads(reply.read())["data"][0]["id"])
