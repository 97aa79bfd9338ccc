"""Measuring through HTTP: any endpoint that speaks OpenAI's completions API, as a client sees it.

Requests are made at once, ``concurrency`` at a time, and streamed; prompts are token ids and differ
from request to request, so that no cache of prefixes helps. Standard library only.
"""

from __future__ import annotations

import json
import random
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from compressor.engines.bench import percentile
from compressor.errors import InputError, UnfitMachineError
from compressor.measurement import Measurement
from compressor.profile import Workload

TOKEN_IDS = range(10, 500)
"""Ids that every vocabulary has and that are ordinary text in most."""

TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Request:
    """What one request saw: seconds to its first token, a token thereafter, and tokens in all."""

    ttft: float
    tpot: float
    tokens: int


def bench_endpoint(
    url: str,
    workload: Workload,
    *,
    model: str | None = None,
    api_key: str = "",
    max_seconds: float = 10.0,
    min_repeats: int = 3,
) -> Measurement:
    """TTFT, TPOT and throughput at ``url`` (with or without ``/v1``), after one warm-up request.

    ``model`` defaults to the first that the endpoint lists. Raises ``InputError`` where nothing
    answers and ``UnfitMachineError`` where the server refuses.
    """
    client = _Client(url, api_key)
    name = model or client.first_model()
    prompts = _prompts(workload)
    client.complete(name, next(prompts), workload.output_tokens)
    requests: list[Request] = []
    rates: list[float] = []
    start = time.perf_counter()
    with ThreadPoolExecutor(workload.concurrency) as pool:
        while len(rates) < min_repeats or time.perf_counter() - start < max_seconds:
            began = time.perf_counter()
            batch = [
                pool.submit(client.complete, name, next(prompts), workload.output_tokens)
                for _ in range(workload.concurrency)
            ]
            done = [future.result() for future in batch]
            rates.append(sum(r.tokens for r in done) / (time.perf_counter() - began))
            requests += done
    return _summary(requests, rates, {"engine": "openai endpoint", "url": url, "model": name})


def _summary(requests: list[Request], rates: list[float], conditions: dict[str, Any]) -> Measurement:
    ttft = [1e3 * request.ttft for request in requests]
    tpot = [1e3 * request.tpot for request in requests]
    return Measurement(
        ttft_ms=statistics.median(ttft),
        tpot_ms=statistics.median(tpot),
        throughput_tok_s=statistics.median(rates),
        ttft_p90_ms=percentile(ttft, 0.9),
        tpot_p90_ms=percentile(tpot, 0.9),
        repeats=len(rates),
        conditions=conditions,
    )


def _prompts(workload: Workload) -> Iterator[list[int]]:
    rng = random.Random(0)
    while True:
        yield rng.choices(TOKEN_IDS, k=workload.prompt_tokens)


class _Client:
    """The two calls that measuring needs."""

    def __init__(self, url: str, api_key: str) -> None:
        base = url.rstrip("/")
        self._base = base if base.endswith("/v1") else f"{base}/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        with self._open("models") as response:
            listed = json.load(response).get("data", [])
        if not listed:
            raise InputError(f"{self._base} lists no model: name one with --model")
        return str(listed[0]["id"])

    def complete(self, model: str, prompt: list[int], tokens: int) -> Request:
        """One streamed completion of exactly ``tokens`` tokens."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began = time.perf_counter()
        first = last = 0.0
        counted = 0
        with self._open("completions", body) as response:
            for chunk in _chunks(response):
                if chunk.get("choices"):
                    last = time.perf_counter() - began
                    first = first or last
                counted = (chunk.get("usage") or {}).get("completion_tokens", counted)
        if not counted or not first:
            raise UnfitMachineError(f"{self._base} ended a completion without tokens or usage: see its log")
        return Request(first, (last - first) / max(1, counted - 1), counted)

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._base}/{path}", data, self._headers)
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            text = error.read(300).decode(errors="replace")
            raise UnfitMachineError(f"{self._base}/{path} answered {error.code}: {text}") from None
        except (OSError, ValueError) as error:
            raise InputError(
                f"nothing answers at {self._base} ({error}): start a server with `compress serve`"
            ) from None


def _chunks(response: Any) -> Iterator[dict[str, Any]]:
    """The JSON values of a server-sent event stream."""
    for line in response:
        text = line.decode("utf-8").strip()
        if text.startswith("data:") and text != "data: [DONE]":
            yield json.loads(text[5:])
