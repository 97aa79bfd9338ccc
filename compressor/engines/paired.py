"""Measuring a candidate turn by turn with a reference, so that what disturbs one disturbs both.

On a machine that others use too, a figure may drift by tens of per cent within minutes; the ratio of
two models that took turns hardly does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compressor.engines.bench import (
    PRECISION,
    Runner,
    Timings,
    time_prefill,
    time_steps,
    timed_part,
    warm_up,
)
from compressor.profile import Workload

FINAL_PRECISION = 0.02
"""As ``PRECISION``, of a ratio that a run's answer rests on: five of 5% may lie 8% apart."""

TRIMMED = 0.1
"""Share of the turns left out at either end: a stall of the machine falls into one model's turn only."""


@dataclass(frozen=True)
class Ratio:
    """Candidate over reference: the geometric mean of the turns' ratios, the extreme ones left out. With the
    relative widths of their 95% intervals.

    Comparing turn by turn is what takes a drift out. On a shared machine the two models' own medians or
    quartiles, divided, scatter by half as much again.
    """

    ttft: float
    tpot: float
    ttft_interval: float
    tpot_interval: float
    turns: int

    @property
    def width(self) -> float:
        """Of the wider interval."""
        return max(self.ttft_interval, self.tpot_interval)

    def to_dict(self) -> dict[str, float]:
        return {
            "ttft_ratio": self.ttft,
            "tpot_ratio": self.tpot,
            "ttft_ratio_interval": self.ttft_interval,
            "tpot_ratio_interval": self.tpot_interval,
            "turns": self.turns,
        }


def time_pair(
    candidate: Runner,
    reference: Runner,
    workload: Workload,
    *,
    max_seconds: float = 6.0,
    min_turns: int = 4,
    precision: float = PRECISION,
) -> tuple[Timings, Timings, Ratio]:
    """Time both on the workload in turns until the ratios are known to ``precision`` or time is up.

    That is the width of their 95% intervals, relative. Who goes first changes from turn to turn.
    """
    mine, theirs = Timings(), Timings()
    pair = [(candidate, mine), (reference, theirs)]
    for runner, _ in pair:
        warm_up(runner, workload)
    start = time.perf_counter()
    while True:
        _take_turns(pair if mine.repeats % 2 == 0 else pair[::-1], workload)
        late = time.perf_counter() - start >= max_seconds
        if mine.repeats >= min_turns and (late or ratio_of(mine, theirs).width < precision):
            return mine, theirs, ratio_of(mine, theirs)


def _take_turns(pair: Sequence[tuple[Runner, Timings]], workload: Workload) -> None:
    """One prefill of each, then the steps of one output of each, always one of the one and one of the other.

    Before its prefill a model makes a step that is not timed, which reads all its weights. Its timed steps
    find in the CPU's caches what the other left there. In bursts of eight steps the smaller model is faster
    by up to a quarter where a large cache happens to be free: on a shared machine that differs from minute to
    minute (ratios from 0.45 to 0.60), while step by step the ratio stays within 0.57 to 0.60.
    """
    skipped, steps = timed_part(workload)
    for runner, timings in pair:
        runner.step()
        time_prefill(runner, timings)
        runner.skip(skipped)
    for _ in range(steps):
        for runner, timings in pair:
            time_steps(runner, 1, timings)


def ratio_of(candidate: Timings, reference: Timings) -> Ratio:
    """The ratio of two models' timings that were taken in turns."""
    ttft, ttft_interval = _mean_ratio(candidate.prefills, reference.prefills)
    tpot, tpot_interval = _mean_ratio(candidate.step_means, reference.step_means)
    return Ratio(ttft, tpot, ttft_interval, tpot_interval, candidate.repeats)


def _mean_ratio(mine: Iterable[float], theirs: Iterable[float]) -> tuple[float, float]:
    """Trimmed geometric mean of the pairs' ratios and its 95% interval's width, infinite below four pairs.

    The interval is Tukey and McLaughlin's (1963), from the deviation of the winsorized logarithms.
    """
    logs = sorted(math.log(a / b) for a, b in zip(mine, theirs, strict=True))
    if not logs:
        return 1.0, 0.0
    cut = int(TRIMMED * len(logs))
    kept = logs[cut : len(logs) - cut]
    ratio = math.exp(statistics.fmean(kept))
    if len(logs) < 4:
        return ratio, float("inf")
    deviation = statistics.stdev([kept[0]] * cut + kept + [kept[-1]] * cut)
    return ratio, 2 * 1.96 * deviation * len(logs) ** 0.5 / len(kept)
