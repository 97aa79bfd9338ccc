"""The pictures of the search: size against accuracy, throughput against accuracy, the two latencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.figure import Figure

from compressor.report import wording
from compressor.report.analysis import Point, budget_throughput_tok_s, evaluated, planar_front
from compressor.report.data import Candidate, ReportData
from compressor.report.frame import FAR, Drawn, Plane, draw_budgets, point_at, set_limits, set_ticks
from compressor.report.style import PALETTE, new_figure, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def size_front(data: ReportData) -> Figure:
    """Bytes of weights against accuracy."""
    scale, unit = (1e9, "GB") if _largest_bytes(data) >= 2e9 else (1e6, "MB")
    budget = data.weight_budget_bytes
    plane = Plane(
        read=lambda score, size, _: None if score is None else (size / scale, 100 * score.value),
        x_label=f"weights ({unit})",
        y_label=f"{data.accuracy_label} (%)",
        smaller_x=True,
        show_x=lambda x: f"{x:.0f} {unit}" if x >= 100 else f"{x:.3g} {unit}",
        x_budget=None if budget is None else budget / scale,
        x_budget_name="memory budget",
        unit=unit,
    )
    return _draw(data, plane)


def throughput_front(data: ReportData) -> Figure:
    """Throughput against accuracy."""
    plane = Plane(
        read=lambda score, _, speed: (
            None if score is None or speed is None else (speed.throughput_tok_s, 100 * score.value)
        ),
        x_label="throughput (output tokens/s over all requests)",
        y_label=f"{data.accuracy_label} (%)",
        smaller_x=False,
        show_x=wording.rate,
        x_budget=budget_throughput_tok_s(data),
        x_budget_name="both latency budgets just met",
        unit="tok/s",
    )
    return _draw(data, plane)


def latencies(data: ReportData) -> Figure:
    """Time to first token against time per output token, with their budgets, on logarithmic axes."""
    ttft, tpot = data.budget("ttft_ms"), data.budget("tpot_ms")
    plane = Plane(
        read=lambda _, __, speed: None if speed is None else (speed.ttft_ms, speed.tpot_ms),
        x_label="time to first token (ms)",
        y_label="time per output token (ms)",
        smaller_x=True,
        show_x=lambda _: "",
        x_budget=ttft.limit if ttft else None,
        x_budget_name="TTFT budget",
        y_budget=tpot.limit if tpot else None,
        unit="ms",
        has_front=False,
        log=True,
    )
    return _draw(data, plane)


def _draw(data: ReportData, plane: Plane) -> Figure:
    figure = new_figure()
    axes = figure.subplots()
    drawn = Drawn()
    _draw_candidates(axes, data, plane, drawn)
    _draw_winner(axes, data, plane, drawn)
    far = _draw_references(axes, data, plane, drawn)
    set_limits(axes, plane, drawn)
    draw_budgets(axes, plane, drawn)
    point_at(axes, far, drawn)
    axes.set_xlabel(plane.x_label)
    axes.set_ylabel(plane.y_label)
    set_ticks(axes, plane)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    place_labels(axes, drawn.labels, drawn.marks, drawn.rows, drawn.columns)
    return figure


def _points(candidates: Sequence[Candidate], plane: Plane) -> list[Point]:
    read = (plane.read(c.accuracy, c.weight_bytes, c.speed) for c in candidates)
    return [point for point in read if point is not None]


def _draw_candidates(axes: Axes, data: ReportData, plane: Plane, drawn: Drawn) -> None:
    ok = evaluated(data)
    over = _points(evaluated(data, "infeasible"), plane)
    others = _points([c for c in ok if not c.on_front], plane)
    front = _points([c for c in ok if c.on_front], plane)
    if over:
        _scatter(
            axes,
            over,
            s=20,
            facecolors="none",
            edgecolors=PALETTE["over"],
            linewidths=1,
            label="over a budget",
            zorder=3,
        )
    if others:
        _scatter(
            axes,
            others,
            s=20,
            color=PALETTE["candidate"],
            alpha=0.5,
            linewidths=0,
            label="evaluated sub-network",
            zorder=3,
        )
    if plane.has_front:
        _draw_front_line(axes, planar_front(_points(ok, plane), plane.smaller_x), plane)
    if front:
        _scatter(
            axes,
            front,
            s=32,
            color=PALETTE["front"],
            edgecolors=PALETTE["surface"],
            linewidths=0.6,
            label="on the front",
            zorder=5,
        )
    drawn.marks += over + others + front


def _scatter(axes: Axes, points: Sequence[Point], **look: Any) -> None:
    xs, ys = zip(*points, strict=True)
    axes.scatter(xs, ys, **look)


def _draw_front_line(axes: Axes, line: list[Point], plane: Plane) -> None:
    """A step: between two points of the front, one has what the lesser of them has."""
    if len(line) > 1:
        xs, ys = zip(*line, strict=True)
        where: Literal["post", "pre"] = "post" if plane.smaller_x else "pre"
        axes.step(xs, ys, where=where, color=PALETTE["front"], linewidth=1.4, alpha=0.75, zorder=4)


def _draw_winner(axes: Axes, data: ReportData, plane: Plane, drawn: Drawn) -> None:
    """The winner at its accuracy on the search's items, where the front it was picked from lies too: above it
    if the winner was tuned alone since."""
    winner = data.winner
    if winner is None:
        return
    score = winner.search_accuracy or winner.accuracy
    point = plane.read(score, winner.weight_bytes, winner.speed)
    if point is None:
        return
    _scatter(
        axes,
        [point],
        s=190,
        marker="*",
        color=PALETTE["winner"],
        edgecolors=PALETTE["surface"],
        linewidths=0.8,
        label="winner",
        zorder=7,
    )
    if plane.has_front and score.low is not None and score.high is not None:
        axes.vlines(
            point[0], 100 * score.low, 100 * score.high, color=PALETTE["winner"], linewidth=1.2, zorder=6
        )
        drawn.marks += [(point[0], 100 * score.low), (point[0], 100 * score.high)]
    drawn.marks.append(point)
    drawn.labels.append((*point, _label("winner", point, plane), PALETTE["winner"]))


def _draw_references(axes: Axes, data: ReportData, plane: Plane, drawn: Drawn) -> list[tuple[Point, str]]:
    """Mark the unpruned models; those too far to the right are returned, to be pointed at."""
    near: list[Point] = []
    far: list[tuple[Point, str]] = []
    reach = FAR * max((x for x, _ in drawn.marks), default=float("inf"))
    for reference in data.references:
        score = reference.search_accuracy or reference.accuracy
        point = plane.read(score, reference.weight_bytes, reference.speed)
        if point is None:
            continue
        label = _label(f"unpruned {reference.numerics.upper()}", point, plane)
        if point[0] > reach and not plane.log:
            far.append((point, label))
            continue
        near.append(point)
        drawn.labels.append((*point, label, PALETTE["reference"]))
    if near:
        _scatter(
            axes,
            near,
            s=52,
            marker="D",
            color=PALETTE["reference"],
            edgecolors=PALETTE["surface"],
            linewidths=0.8,
            label="unpruned model",
            zorder=6,
        )
    drawn.marks += near
    return far


def _label(name: str, point: Point, plane: Plane) -> str:
    figure = plane.show_x(point[0])
    return f"{name}, {figure}" if figure else name


def _largest_bytes(data: ReportData) -> int:
    sizes = [c.weight_bytes for c in data.candidates] + [r.weight_bytes for r in data.references]
    return max(sizes, default=0)
