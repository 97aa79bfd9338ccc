"""What the front has in common: planar fronts, how often a layer is kept, how wide it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.report.data import Candidate, ReportData

Point = tuple[float, float]


@dataclass(frozen=True)
class LayerStatistics:
    """One layer of the super-network over the sub-networks of a front.

    ``keep_share`` is the share of them that keep it, ``mean_width`` its mean MLP width there as a
    fraction of the full width (None where no sub-network keeps it).
    """

    layer: int
    keep_share: float
    mean_width: float | None


@dataclass(frozen=True)
class Findings:
    """What the statistics amount to; layers as (first, last, count) or lists of layer numbers."""

    sub_networks: int
    always_kept: tuple[int, ...]
    never_kept: tuple[int, ...]
    often_dropped: tuple[int, ...]
    width_by_third: tuple[float | None, float | None, float | None]


def front_candidates(data: ReportData) -> list[Candidate]:
    """The run's front, the smallest sub-network first."""
    return sorted((c for c in data.candidates if c.on_front), key=lambda c: c.weight_bytes)


def layer_statistics(
    front: Sequence[Candidate], num_layers: int, intermediate_size: int
) -> list[LayerStatistics]:
    """Statistics of every layer of the super-network over ``front``."""
    widths: list[list[int]] = [[] for _ in range(num_layers)]
    for candidate in front:
        for layer, width in zip(candidate.subnet.layers, candidate.subnet.widths, strict=True):
            widths[layer].append(width)
    return [
        LayerStatistics(
            layer,
            len(kept) / len(front) if front else 0.0,
            sum(kept) / len(kept) / intermediate_size if kept else None,
        )
        for layer, kept in enumerate(widths)
    ]


def findings(data: ReportData) -> Findings:
    """What the front's sub-networks agree on."""
    front = front_candidates(data)
    layers = layer_statistics(front, data.num_layers, data.intermediate_size)
    return Findings(
        sub_networks=len(front),
        always_kept=tuple(s.layer for s in layers if front and s.keep_share == 1),
        never_kept=tuple(s.layer for s in layers if front and s.keep_share == 0),
        often_dropped=tuple(s.layer for s in layers if front and 0 < s.keep_share < 0.5),
        width_by_third=(
            _mean_width(layers[: data.num_layers // 3]),
            _mean_width(layers[data.num_layers // 3 : -(data.num_layers // 3) or None]),
            _mean_width(layers[-(data.num_layers // 3) :] if data.num_layers >= 3 else []),
        ),
    )


def planar_front(points: Sequence[Point], smaller_x: bool) -> list[Point]:
    """The points that no other one beats in both coordinates, by ascending x.

    y is to be large; x is to be small if ``smaller_x``, else large.
    """
    best: list[Point] = []
    for x, y in sorted(set(points), key=lambda p: (p[0] if smaller_x else -p[0], -p[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return sorted(best)


def evaluated(data: ReportData, status: str = "ok") -> list[Candidate]:
    """Candidates of that status that have a score."""
    return [c for c in data.candidates if c.status == status and c.accuracy is not None]


def budget_throughput_tok_s(data: ReportData) -> float | None:
    """Output tokens/s of a workload that just meets its latency budgets; None without both.

    Every request takes TTFT for its first token and TPOT for each of the others.
    """
    ttft, tpot = data.budget("ttft_ms"), data.budget("tpot_ms")
    if ttft is None or tpot is None:
        return None
    load = data.workload
    request_ms = ttft.limit + (load.output_tokens - 1) * tpot.limit
    return load.concurrency * load.output_tokens * 1000 / request_ms


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: ``0 to 4, 7, 9 to 11``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _mean_width(layers: Sequence[LayerStatistics]) -> float | None:
    """Mean width over the layers, each counted as often as it is kept."""
    kept = [(s.keep_share, s.mean_width) for s in layers if s.mean_width is not None]
    total = sum(share for share, _ in kept)
    return sum(share * width for share, width in kept) / total if total else None
