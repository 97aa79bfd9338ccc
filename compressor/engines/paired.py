"""Measuring a candidate turn by turn with a reference, so that what disturbs one disturbs both.

On a machine that others use too, a figure may drift by tens of per cent within minutes; the ratio of
two models that took turns hardly does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from compressor.engines.bench import PRECISION, Runner, Timings, relative_interval, time_once, warm_up
from compressor.profile import Workload


@dataclass(frozen=True)
class Ratio:
    """Candidate over reference, each by the lower quartile of its turns: whatever disturbs a machine adds
    time and never takes any away. With the relative widths of the 95% intervals of the turns' ratios."""

    ttft: float
    tpot: float
    ttft_interval: float
    tpot_interval: float
    turns: int

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
) -> tuple[Timings, Timings, Ratio]:
    """Time both on the workload in turns until the ratios are known to ``PRECISION`` or time is up.

    Who goes first changes from turn to turn. A model's turn begins with a prefill that is not timed: what
    the other left in the CPU's caches is not what it finds when it serves alone.
    """
    mine, theirs = Timings(), Timings()
    for runner in (candidate, reference):
        warm_up(runner, workload)
    start = time.perf_counter()
    while True:
        turn = [(candidate, mine), (reference, theirs)]
        for runner, timings in turn if mine.repeats % 2 == 0 else reversed(turn):
            runner.prefill()
            time_once(runner, workload, timings)
        late = time.perf_counter() - start >= max_seconds
        if mine.repeats >= min_turns and (late or _settled(mine, theirs)):
            return mine, theirs, ratio_of(mine, theirs)


def ratio_of(candidate: Timings, reference: Timings) -> Ratio:
    """The ratio of two models' timings that were taken in turns."""
    ttft, tpot = _ratios(candidate, reference)
    return Ratio(
        ttft=_quick(candidate.prefills) / _quick(reference.prefills),
        tpot=_quick(candidate.rounds) / _quick(reference.rounds) if tpot else 1.0,
        ttft_interval=relative_interval(ttft),
        tpot_interval=relative_interval(tpot) if tpot else 0.0,
        turns=len(ttft),
    )


def _quick(values: Sequence[float]) -> float:
    """The lower quartile, interpolated."""
    ordered = sorted(values)
    place = 0.25 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _ratios(candidate: Timings, reference: Timings) -> tuple[list[float], list[float]]:
    prefills = zip(candidate.prefills, reference.prefills, strict=True)
    rounds = zip(candidate.rounds, reference.rounds, strict=True)
    return [a / b for a, b in prefills], [a / b for a, b in rounds]


def _settled(candidate: Timings, reference: Timings) -> bool:
    return all(relative_interval(r) < PRECISION for r in _ratios(candidate, reference) if r)
