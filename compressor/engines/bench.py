"""Timing a loaded model on a workload: warm-up, repeats, medians. The same for every engine.

A workload is served as a static batch: ``concurrency`` prompts are read together (TTFT ends with
their first tokens), then every step yields one token a sequence (TPOT). Throughput follows from both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from compressor.measurement import Measurement
from compressor.profile import Workload

WARM_UP_STEPS = 4
MAX_STEPS = 48
"""Steps timed in one repeat; of longer outputs, those in the middle, where the cache is half full."""

PRECISION = 0.05
"""Repeats stop once the 95% interval of both medians is narrower than this share of the median."""

NOISY = 0.1
"""Quartiles of the repeats further apart than this share of the median are the machine's doing: its speed
changed meanwhile, and the figures are marked. (One slow repeat among many says nothing.)"""


class Runner(Protocol):
    """A loaded model and one static batch of prompts."""

    def prefill(self) -> None:
        """Read fresh prompts up to their first tokens."""
        ...

    def step(self) -> None:
        """One more token for every sequence."""
        ...

    def skip(self, tokens: int) -> None:
        """Count tokens as generated without computing them, where the engine can; else generate."""
        ...


@dataclass
class Timings:
    """Seconds of each prefill and of each step, in the order they ran."""

    prefills: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def repeats(self) -> int:
        return len(self.prefills)

    @property
    def step_means(self) -> list[float]:
        """Seconds of a step, the mean of each repeat; none where an output has no steps."""
        return [statistics.fmean(steps) for steps in self._steps_by_repeat()]

    @property
    def step_medians(self) -> list[float]:
        """Seconds of a step, the median of each repeat; none where an output has no steps."""
        return [statistics.median(steps) for steps in self._steps_by_repeat()]

    @property
    def settled(self) -> bool:
        """Whether the medians are known to ``PRECISION``."""
        return all(
            relative_interval(values) < PRECISION for values in (self.prefills, self.step_medians) if values
        )

    @property
    def faults(self) -> list[str]:
        """What four repeats or more say of a machine whose own speed changed meanwhile."""
        taken = {"TTFT": self.prefills, "TPOT": self.step_medians}
        spreads = {name: _spread(values) for name, values in taken.items() if len(values) >= 4}
        return [
            f"{name} varied: its quartiles lie {spread:.0%} of the median apart"
            for name, spread in spreads.items()
            if spread > NOISY
        ]

    def _steps_by_repeat(self) -> list[list[float]]:
        count = len(self.steps) // max(1, self.repeats)
        return [self.steps[i : i + count] for i in range(0, len(self.steps), count)] if count else []


def time_workload(
    runner: Runner, workload: Workload, *, max_seconds: float = 3.0, min_repeats: int = 3
) -> Timings:
    """Warm up, then repeat the workload until its medians are settled or the time is up.

    At least ``min_repeats`` are run whatever they take, except that a model so slow that one
    repeat takes longer than ``max_seconds`` is run just once after its warm-up.
    """
    timings = Timings()
    warm_up(runner, workload)
    start = time.perf_counter()
    while True:
        time_once(runner, workload, timings)
        elapsed = time.perf_counter() - start
        enough = timings.repeats >= min_repeats or elapsed > max_seconds * timings.repeats
        if enough and (elapsed >= max_seconds or timings.settled):
            return timings


def warm_up(runner: Runner, workload: Workload) -> None:
    """A prefill and a few steps that are not timed."""
    runner.prefill()
    for _ in range(min(WARM_UP_STEPS, workload.output_tokens - 1)):
        runner.step()


def time_once(runner: Runner, workload: Workload, timings: Timings) -> None:
    """One repeat: a prefill, then the steps of one output."""
    time_prefill(runner, timings)
    skipped, steps = timed_part(workload)
    runner.skip(skipped)
    time_steps(runner, steps, timings)


def timed_part(workload: Workload) -> tuple[int, int]:
    """Of an output's steps after the first token: how many to skip, and how many of those after to run."""
    total = workload.output_tokens - 1
    steps = min(total, MAX_STEPS)
    return (total - steps) // 2, steps


def time_prefill(runner: Runner, timings: Timings) -> None:
    """A prefill, timed."""
    began = time.perf_counter()
    runner.prefill()
    timings.prefills.append(time.perf_counter() - began)


def time_steps(runner: Runner, count: int, timings: Timings) -> None:
    """``count`` steps, each timed."""
    for _ in range(count):
        began = time.perf_counter()
        runner.step()
        timings.steps.append(time.perf_counter() - began)


def summarise(
    timings: Timings,
    workload: Workload,
    *,
    peak_memory_bytes: int = 0,
    conditions: Mapping[str, Any] | None = None,
) -> Measurement:
    """Medians and 90th percentiles of what was timed; ``unfit`` among the conditions if it kept changing."""
    ttft = statistics.median(timings.prefills)
    tpot = statistics.median(timings.step_medians) if timings.step_medians else 0.0
    request = ttft + (workload.output_tokens - 1) * tpot
    found = dict(conditions or {})
    if reasons := [*found.get("unfit", []), *timings.faults]:
        found["unfit"] = reasons
    return Measurement(
        ttft_ms=1e3 * ttft,
        tpot_ms=1e3 * tpot,
        throughput_tok_s=workload.concurrency * workload.output_tokens / request,
        peak_memory_bytes=peak_memory_bytes,
        ttft_p90_ms=1e3 * percentile(timings.prefills, 0.9),
        tpot_p90_ms=1e3 * percentile(timings.steps, 0.9),
        repeats=timings.repeats,
        conditions=found,
    )


def relative_interval(values: Sequence[float]) -> float:
    """Width of the 95% interval of the median, as a share of it; infinite below four values.

    Normal approximation of the median's standard error, 1.2533 s / sqrt(n), with s from the median
    absolute deviation, so that a single disturbed repeat does not count (Rousseeuw & Croux 1993).
    """
    if len(values) < 4:
        return float("inf")
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median([abs(value - middle) for value in values])
    return float(2 * 1.96 * 1.2533 * spread / len(values) ** 0.5 / middle) if spread else 0.0


def _spread(values: Sequence[float]) -> float:
    """Distance of the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if high > low else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of the values do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
