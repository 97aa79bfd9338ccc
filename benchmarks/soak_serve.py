"""An hour of mixed load on the endpoint; memory must be flat and every reply whole.

Clients ask for short and long answers, streams, several choices, JSON, log-probabilities, a shared
system prompt; some leave early, some send nonsense. Prints memory a quarter, then the verdict: the last
quarter within 2% of the second. Exit 1 otherwise.

    python benchmarks/soak_serve.py [PACKAGE] [--minutes 60] [--pause 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
from rivals import ROOT, our_package
from verdict import Bound, conclude

CLIENTS = 6
SAMPLE_SECONDS = 0.5
FLATNESS = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, nargs="?", help="default: the unpruned starter")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--pause", type=float, default=0, help="seconds between a client's requests")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cache = ROOT / "runs" / "bench-serve"
    cache.mkdir(parents=True, exist_ok=True)
    package = options.package or our_package(cache)
    port = _free_port()
    command = [sys.executable, "-m", "serve", str(package), "--port", str(port)]
    flags = ["--max-concurrency", "4", "--max-context", "1024", "--queue-size", "16"]
    server = subprocess.Popen([*command, *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        _wait(server, port)
        samples, outcomes = _load(server, port, options)
    finally:
        server.terminate()
        server.wait(60)
    return _verdict(samples, outcomes)


def _load(
    server: subprocess.Popen[bytes], port: int, options: argparse.Namespace
) -> tuple[list[float], Counter[str]]:
    """Memory samples, MiB, and how requests ended."""
    end = time.monotonic() + options.minutes * 60
    outcomes: Counter[str] = Counter()
    clients = [
        threading.Thread(target=_client, args=(port, end, options.seed + i, options.pause, outcomes))
        for i in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    samples = []
    process = psutil.Process(server.pid)
    while time.monotonic() < end:
        samples.append(process.memory_info().rss / 2**20)
        time.sleep(SAMPLE_SECONDS)
    for client in clients:
        client.join()
    return samples, outcomes


def _client(port: int, end: float, seed: int, pause: float, outcomes: Counter[str]) -> None:
    chance = random.Random(seed)
    while time.monotonic() < end:
        time.sleep(chance.random() * 2 * pause)
        try:
            outcomes[_ask(port, chance)] += 1
        except urllib.error.HTTPError as error:
            outcomes[f"status {error.code}"] += 1
            error.read()
        except OSError as error:
            outcomes[type(error).__name__] += 1


def _ask(port: int, chance: random.Random) -> str:
    """One request of a random kind; returns how it ended."""
    body: dict[str, object] = {
        "messages": [{"role": "user", "content": "tell me about numbers " * chance.choice([1, 5, 60])}],
        "max_tokens": chance.choice([4, 32, 128]),
        "temperature": chance.choice([0, 0.9]),
        "stream": chance.random() < 0.6,
        "n": chance.choice([1, 1, 1, 2]),
    }
    kind = chance.random()
    if kind < 0.1:
        body["response_format"] = {"type": "json_object"}
    elif kind < 0.2:
        body |= {"logprobs": True, "top_logprobs": 3, "stop": ["the"]}
    elif kind < 0.4:
        system = {"role": "system", "content": "You answer questions about numbers, briefly. " * 20}
        body["messages"] = [system, {"role": "user", "content": f"What is {chance.randrange(10**6)}?"}]
    elif kind < 0.45:
        body["temperature"] = "hot"
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=900) as reply:
        if body["stream"] and chance.random() < 0.3:
            reply.readline()
            return "left"
        text = reply.read()
    whole = text.endswith(b"data: [DONE]\n\n") if body["stream"] else json.loads(text)["choices"]
    return "answered" if whole else "cut"


def _verdict(samples: list[float], outcomes: Counter[str]) -> int:
    quarter = max(1, len(samples) // 4)
    quarters = [statistics.median(samples[i * quarter : (i + 1) * quarter]) for i in range(4)]
    growth = quarters[3] / quarters[1] - 1
    print("memory by quarter (MiB): " + ", ".join(f"{value:.1f}" for value in quarters))
    print("requests: " + ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())))
    wrong = [name for name in outcomes if name not in ("answered", "left", "status 400", "status 429")]
    flat = abs(growth) <= FLATNESS
    print(f"last quarter against second: {growth:+.1%} ({'flat' if flat else 'not flat'})")
    bounds = [
        Bound("memory, last quarter against second", abs(growth), FLATNESS),
        Bound("requests that went wrong", sum(outcomes[name] for name in wrong), 0),
    ]
    return conclude(bounds, {"quarters_mib": quarters, "growth": growth, "outcomes": dict(outcomes)})


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit("the server stopped while starting")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    sys.exit(main())
