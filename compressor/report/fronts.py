"""The pictures of the search: size against accuracy, throughput against accuracy, the two latencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compressor.report import wording
from compressor.report.analysis import Point, budget_throughput_tok_s, evaluated, planar_front
from compressor.report.data import Candidate, ReportData, Score, Speed
from compressor.report.style import PALETTE, new_figure, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAR = 1.6
"""A reference beyond so many times the candidates' largest x is pointed at from the edge instead."""
FAR_LOG = 3.0
"""A budget beyond so many times what was measured is noted instead of drawn on logarithmic axes."""
MARGIN = 0.06

Read = Callable[[Score | None, int, Speed | None], Point | None]


@dataclass(frozen=True)
class _Plane:
    """What the axes are: ``read`` gives a point of (score, bytes of weights, speed)."""

    read: Read
    x_label: str
    y_label: str
    smaller_x: bool
    show_x: Callable[[float], str]
    x_budget: float | None = None
    x_budget_name: str = ""
    y_budget: float | None = None
    unit: str = ""
    has_front: bool = True
    log: bool = False


@dataclass
class _Drawn:
    """What is on the axes already, for limits and labels."""

    marks: list[Point] = field(default_factory=list)
    labels: list[tuple[float, float, str, str]] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    columns: list[float] = field(default_factory=list)


def size_front(data: ReportData) -> Figure:
    """Bytes of weights against accuracy."""
    scale, unit = (1e9, "GB") if _largest_bytes(data) >= 2e9 else (1e6, "MB")
    budget = data.weight_budget_bytes
    plane = _Plane(
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
    plane = _Plane(
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
    plane = _Plane(
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


def _draw(data: ReportData, plane: _Plane) -> Figure:
    figure = new_figure()
    axes = figure.subplots()
    drawn = _Drawn()
    _draw_candidates(axes, data, plane, drawn)
    _draw_winner(axes, data, plane, drawn)
    far = _draw_references(axes, data, plane, drawn)
    _set_limits(axes, plane, drawn)
    _draw_budgets(axes, plane, drawn)
    _point_at(axes, far, drawn)
    axes.set_xlabel(plane.x_label)
    axes.set_ylabel(plane.y_label)
    _set_ticks(axes, plane)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    place_labels(axes, drawn.labels, drawn.marks, drawn.rows, drawn.columns)
    return figure


def _points(candidates: Sequence[Candidate], plane: _Plane) -> list[Point]:
    read = (plane.read(c.accuracy, c.weight_bytes, c.speed) for c in candidates)
    return [point for point in read if point is not None]


def _draw_candidates(axes: Axes, data: ReportData, plane: _Plane, drawn: _Drawn) -> None:
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


def _draw_front_line(axes: Axes, line: list[Point], plane: _Plane) -> None:
    """A step: between two points of the front, one has what the lesser of them has."""
    if len(line) > 1:
        xs, ys = zip(*line, strict=True)
        where: Literal["post", "pre"] = "post" if plane.smaller_x else "pre"
        axes.step(xs, ys, where=where, color=PALETTE["front"], linewidth=1.4, alpha=0.75, zorder=4)


def _draw_winner(axes: Axes, data: ReportData, plane: _Plane, drawn: _Drawn) -> None:
    """The winner at its figures of the search, so that it lies on the front it was picked from."""
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


def _draw_references(axes: Axes, data: ReportData, plane: _Plane, drawn: _Drawn) -> list[tuple[Point, str]]:
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


def _label(name: str, point: Point, plane: _Plane) -> str:
    figure = plane.show_x(point[0])
    return f"{name}, {figure}" if figure else name


def _set_limits(axes: Axes, plane: _Plane, drawn: _Drawn) -> None:
    """Room for every mark, and for a budget that is not out of all proportion."""
    xs, ys = [x for x, _ in drawn.marks], [y for _, y in drawn.marks]
    if not xs:
        xs, ys = [plane.x_budget or 1.0], [plane.y_budget or 1.0]
    reach = FAR_LOG if plane.log else FAR
    for values, budget in ((xs, plane.x_budget), (ys, plane.y_budget)):
        if budget is not None and min(values) / reach <= budget <= reach * max(values):
            values.append(budget)
    if plane.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlim(*_padded(xs, 2 * MARGIN, plane.log))
    axes.set_ylim(*_padded(ys, 2 * MARGIN, plane.log))


def _padded(values: list[float], margin: float, log: bool) -> tuple[float, float]:
    """Limits a margin (a share of the range) beyond the values."""
    low, high = min(values), max(values)
    if log and low > 0:
        factor = max(high / low, 1.5) ** margin
        return low / factor, high * factor
    pad = margin * ((high - low) or abs(high) or 1.0)
    return low - pad, high + pad


def _set_ticks(axes: Axes, plane: _Plane) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        round_numbers = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 7)
        axis.set_major_locator(
            LogLocator(subs=round_numbers) if plane.log else MaxNLocator(7, steps=[1, 2, 2.5, 5, 10])
        )
        axis.set_major_formatter(plain)
        axis.set_minor_locator(NullLocator())
    if plane.has_front:
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])


def _draw_budgets(axes: Axes, plane: _Plane, drawn: _Drawn) -> None:
    """A line at each budget and a tint over what it forbids; off the axes, a note in their corner."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    look: dict[str, Any] = {"color": PALETTE["budget"], "linewidth": 1.3, "zorder": 2}
    tint: dict[str, Any] = {"color": PALETTE["budget"], "alpha": 0.07, "linewidth": 0, "zorder": 1}
    notes = []
    if plane.x_budget is not None and left < plane.x_budget < right:
        axes.axvline(plane.x_budget, label=plane.x_budget_name, linestyle=(0, (5, 3)), **look)
        axes.axvspan(*((plane.x_budget, right) if plane.smaller_x else (left, plane.x_budget)), **tint)
        drawn.columns.append(plane.x_budget)
    elif plane.x_budget is not None:
        notes.append(f"{plane.x_budget_name} ({wording.significant(plane.x_budget)} {plane.unit})")
    if plane.y_budget is not None and bottom < plane.y_budget < top:
        axes.axhline(plane.y_budget, label="TPOT budget", linestyle=(0, (1.5, 1.5)), **look)
        axes.axhspan(plane.y_budget, top, **tint)
        drawn.rows.append(plane.y_budget)
    elif plane.y_budget is not None:
        notes.append(f"TPOT budget ({wording.significant(plane.y_budget)} {plane.unit})")
    if notes:
        text = f"outside this picture: {', '.join(notes)}"
        axes.set_title(text, loc="left", color=PALETTE["budget"], fontsize=8.8)


def _point_at(axes: Axes, far: list[tuple[Point, str]], drawn: _Drawn) -> None:
    """A dotted line to the right edge, at the height of a reference beyond it."""
    edge = axes.get_xlim()[1]
    for (_, y), label in far:
        bottom, top = axes.get_ylim()
        room = 0.09 * (top - bottom)
        axes.set_ylim(min(bottom, y - room), max(top, y + room))
        axes.axhline(y, color=PALETTE["reference"], linewidth=0.9, linestyle=(0, (1, 2)), zorder=2)
        drawn.rows.append(y)
        drawn.labels.append((edge, y, f"{label} →", PALETTE["reference"]))


def _largest_bytes(data: ReportData) -> int:
    sizes = [c.weight_bytes for c in data.candidates] + [r.weight_bytes for r in data.references]
    return max(sizes, default=0)
