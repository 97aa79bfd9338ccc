"""The frame of a picture of the search: what its axes are, their limits, ticks and budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compressor.report import wording
from compressor.report.analysis import Point
from compressor.report.data import Score, Speed
from compressor.report.style import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAR = 1.6
"""A reference beyond so many times the candidates' largest x is pointed at from the edge instead."""
FAR_LOG = 3.0
"""A budget beyond so many times what was measured is noted instead of drawn on logarithmic axes."""
MARGIN = 0.06

Read = Callable[[Score | None, int, Speed | None], Point | None]


@dataclass(frozen=True)
class Plane:
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
class Drawn:
    """What is on the axes already, for limits and labels."""

    marks: list[Point] = field(default_factory=list)
    labels: list[tuple[float, float, str, str]] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    columns: list[float] = field(default_factory=list)


def set_limits(axes: Axes, plane: Plane, drawn: Drawn) -> None:
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


def set_ticks(axes: Axes, plane: Plane) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        round_numbers = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 7)
        axis.set_major_locator(
            LogLocator(subs=round_numbers) if plane.log else MaxNLocator(7, steps=[1, 2, 2.5, 5, 10])
        )
        axis.set_major_formatter(plain)
        axis.set_minor_locator(NullLocator())
    if plane.has_front:
        bottom, top = axes.get_ylim()
        axes.set_yticks([t for t in axes.get_yticks() if max(0, bottom) <= t <= min(100, top)])


def draw_budgets(axes: Axes, plane: Plane, drawn: Drawn) -> None:
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


def point_at(axes: Axes, far: list[tuple[Point, str]], drawn: Drawn) -> None:
    """A dotted line to the right edge, at the height of a reference beyond it."""
    edge = axes.get_xlim()[1]
    for (_, y), label in far:
        bottom, top = axes.get_ylim()
        room = 0.09 * (top - bottom)
        axes.set_ylim(min(bottom, y - room), max(top, y + room))
        axes.axhline(y, color=PALETTE["reference"], linewidth=0.9, linestyle=(0, (1, 2)), zorder=2)
        drawn.rows.append(y)
        drawn.labels.append((edge, y, f"{label} →", PALETTE["reference"]))
