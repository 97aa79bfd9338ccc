"""Prometheus metrics: latencies of finished requests, and the batching loop's state when scraped."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.scheduler import Scheduler
from serve.sequence import SequenceState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)
_REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_LoopCollector(scheduler))
        self._ttft = self._histogram("ttft_seconds", "Time to first token", _TTFT_BUCKETS)
        self._tpot = self._histogram("tpot_seconds", "Time per output token after the first", _TPOT_BUCKETS)
        self._seconds = self._histogram("request_seconds", "Time of a whole request", _REQUEST_BUCKETS)
        self._replies = Counter(
            "edge_http_responses", "HTTP responses by status", ["status"], registry=self._registry
        )

    def observe(self, sequence: SequenceState) -> None:
        """Record a finished sequence."""
        times, now = sequence.times, time.monotonic()
        self._seconds.observe(now - times.submitted)
        if times.first_token is not None and times.last_token is not None:
            self._ttft.observe(times.first_token - times.submitted)
            if len(sequence.output) > 1:
                self._tpot.observe((times.last_token - times.first_token) / (len(sequence.output) - 1))

    def count_reply(self, status: int) -> None:
        self._replies.labels(str(status)).inc()

    def render(self) -> bytes:
        return bytes(generate_latest(self._registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"edge_{name}", text, buckets=buckets, registry=self._registry)


class _LoopCollector(Collector):
    """Reads the batching loop at the moment of a scrape."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        loop, rows = self._scheduler, self._scheduler.rows
        gauges = {
            "requests_waiting": ("Sequences in the queue", loop.waiting),
            "requests_running": ("Sequences in the batch", loop.running),
            "cache_tokens": ("Cache positions in memory, idle prefixes included", rows.cache.used_tokens),
            "cache_limit_tokens": ("Cache positions that may be in memory", rows.budget_tokens),
            "cache_bytes": (
                "Memory of the cache",
                rows.cache.used_tokens * rows.cache.shape.bytes_per_token,
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"edge_{name}", text, value)
        for name, value in vars(loop.counters).items():
            yield CounterMetricFamily(f"edge_{name}", name.replace("_", " "), value)
