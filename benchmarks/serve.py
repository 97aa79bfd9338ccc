"""The endpoint beside llama.cpp's server and beside the bare engine, in one run, with the same prompts.

Rounds alternate between the servers, so that a disturbance hits both. Prompts are random token ids, the
same for every server and never twice, so that no cache helps. Prints a table, then one line of JSON.
Without --llama-server only ours is measured.

    python benchmarks/serve.py PACKAGE --llama-server PATH/llama-server --gguf MODEL-Q8_0.gguf
"""

from __future__ import annotations

import argparse
import http.client
import itertools
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STREAMS = 8
PROMPT_TOKENS = 512
LONG_PROMPT_TOKENS = 4000
VOCABULARY = (100, 30000)


def main() -> int:
    options = _options()
    random_ids = random.Random(options.seed)
    with ExitStack() as stack:
        servers = [stack.enter_context(server) for server in _servers(options)]
        results = [Result(server.name) for server in servers]
        for _ in range(options.rounds):
            prompts = [_prompt(random_ids, PROMPT_TOKENS) for _ in range(STREAMS + 1)]
            long_prompt = _prompt(random_ids, LONG_PROMPT_TOKENS)
            for server, result in zip(servers, results, strict=True):
                _measure(server, result, prompts, long_prompt, options.tokens)
    bare = _bare_tpot(options.package, options.threads, options.tokens, random_ids)
    _report(results, bare, options)
    return 0


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    port: int


@dataclass
class Result:
    """Figures of one server, one entry a round."""

    name: str
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    streams_tok_s: list[float] = field(default_factory=list)
    stall_p99_ratio: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        values = {name: entry for name, entry in vars(self).items() if name != "name"}
        return {name: round(statistics.median(entry), 2) for name, entry in values.items() if entry}


def _measure(
    server: Server, result: Result, prompts: list[list[int]], long_prompt: list[int], tokens: int
) -> None:
    times = _stream(server, prompts[0], tokens)
    result.ttft_ms.append(times[0] * 1e3)
    result.tpot_ms.append((times[-1] - times[0]) / (tokens - 1) * 1e3)
    result.streams_tok_s.append(_together(server, [prompt[:32] for prompt in prompts[1:]], tokens))
    result.stall_p99_ratio.append(_stall(server, prompts[0][:16], long_prompt, tokens))


def _together(server: Server, prompts: list[list[int]], tokens: int) -> float:
    """Output tokens a second over all streams, first request sent to last token received."""
    threads = [threading.Thread(target=_stream, args=(server, prompt, tokens)) for prompt in prompts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(prompts) * tokens / (time.perf_counter() - began)


def _stall(server: Server, prompt: list[int], long_prompt: list[int], tokens: int) -> float:
    """p99 of a stream's gaps while a long prompt is read, over the median of its gaps before."""
    arrivals: list[float] = []
    began = time.perf_counter()
    reader = threading.Thread(target=lambda: arrivals.extend(_stream(server, prompt, tokens * 6)))
    reader.start()
    time.sleep(0.02 * tokens)
    sent = time.perf_counter() - began
    long_times = _stream(server, long_prompt, 1)
    done = sent + long_times[0]
    reader.join()
    gaps = [(late, late - early) for early, late in itertools.pairwise(arrivals)]
    before = [gap for at, gap in gaps if at <= sent]
    during = sorted(gap for at, gap in gaps if sent < at <= done)
    if not before or len(during) < 3:
        return float("nan")
    return during[int(0.99 * (len(during) - 1))] / statistics.median(before)


def _stream(server: Server, prompt: list[int], tokens: int) -> list[float]:
    """Seconds after sending at which each event came: about one a token, and one for the end."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    began = time.perf_counter()
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps(body | {"cache_prompt": False}),
        {"Content-Type": "application/json"},
    )
    reply = connection.getresponse()
    if reply.status != 200:
        raise SystemExit(f"{server.name}: {reply.status} {reply.read()[:300]!r}")
    times = [time.perf_counter() - began for line in reply if line.startswith(b"data: {")]
    connection.close()
    return times


def _bare_tpot(package: Path, threads: int, tokens: int, random_ids: random.Random) -> float:
    """Time per output token of the engine without a server, ms."""
    sys.path.insert(0, str(ROOT))
    from serve.kvcache import KeyValueCache
    from serve.model import Model, cache_shape, open_session
    from serve.package import open_package

    opened = open_package(package)
    session = open_session(opened.graph, threads)
    cache = KeyValueCache(cache_shape(session, opened.kv_heads, opened.head_dim, 1024), 1)
    model = Model(session, cache)
    model.warm_up()
    logits = model.prefill(0, _prompt(random_ids, PROMPT_TOKENS))[-1]
    began = time.perf_counter()
    for _ in range(tokens):
        logits = model.decode([int(logits.argmax())])[0]
    return (time.perf_counter() - began) / tokens * 1e3


def _servers(options: argparse.Namespace) -> list:
    ours = [sys.executable, "-m", "serve", str(options.package), "--threads", str(options.threads)]
    servers = [_running("edge-compressor", [*ours, "--max-concurrency", str(STREAMS)])]
    if options.llama_server:
        theirs = [str(options.llama_server), "-m", str(options.gguf), "-t", str(options.threads)]
        context = str(STREAMS * 8192)
        theirs += ["-tb", str(options.threads), "-np", str(STREAMS), "-c", context, "--no-webui"]
        servers.append(_running("llama.cpp", theirs))
    return servers


@contextmanager
def _running(name: str, command: list[str]) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        _wait(process, name, port)
        yield Server(name, port)
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], name: str, port: int) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"{name} stopped while starting")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit(f"{name} did not start")


def _prompt(random_ids: random.Random, tokens: int) -> list[int]:
    return [random_ids.randrange(*VOCABULARY) for _ in range(tokens)]


def _report(results: list[Result], bare: float, options: argparse.Namespace) -> None:
    rows = [(result.name, result.medians()) for result in results]
    columns = {
        "ttft_ms": f"TTFT {PROMPT_TOKENS} (ms)",
        "tpot_ms": "TPOT (ms)",
        "streams_tok_s": f"{STREAMS} streams (tok/s)",
        "stall_p99_ratio": f"p99/median while {LONG_PROMPT_TOKENS} arrive",
    }
    print(f"{'server':18}" + "".join(f"{title:>32}" for title in columns.values()))
    for name, medians in rows:
        print(f"{name:18}" + "".join(f"{medians.get(column, float('nan')):32.2f}" for column in columns))
    print(f"bare engine TPOT {bare:.2f} ms: the server adds {(rows[0][1]['tpot_ms'] / bare - 1) * 100:.1f}%")
    print(json.dumps({"rounds": options.rounds, "bare_tpot_ms": round(bare, 2), **dict(rows)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server")
    parser.add_argument("--gguf", type=Path, help="the same model in Q8_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="a stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
