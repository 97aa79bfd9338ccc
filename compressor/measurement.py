"""What an engine reports about a candidate: speed and memory, with where and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """Speed of one candidate on one workload.

    TTFT is the time from the request to its first token, TPOT the time per output token after the
    first, both per request; throughput counts output tokens of all concurrent requests.
    """

    ttft_ms: float
    tpot_ms: float
    throughput_tok_s: float
    peak_memory_bytes: int = 0
    ttft_p90_ms: float = 0.0
    tpot_p90_ms: float = 0.0
    repeats: int = 1
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The figures alone, for the ledger."""
        figures = asdict(self)
        figures.pop("conditions")
        return {name: float(value) for name, value in figures.items()}

    @classmethod
    def from_metrics(
        cls, metrics: Mapping[str, float], conditions: Mapping[str, Any] | None = None
    ) -> Measurement:
        return cls(
            ttft_ms=metrics["ttft_ms"],
            tpot_ms=metrics["tpot_ms"],
            throughput_tok_s=metrics["throughput_tok_s"],
            peak_memory_bytes=int(metrics.get("peak_memory_bytes", 0)),
            ttft_p90_ms=metrics.get("ttft_p90_ms", 0.0),
            tpot_p90_ms=metrics.get("tpot_p90_ms", 0.0),
            repeats=int(metrics.get("repeats", 1)),
            conditions=dict(conditions or {}),
        )
