"""The scatter of sub-networks: the front, the others, the whole model, the budget's line."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static
from textual_plot import HiResMode, NumericAxisFormatter, PlotWidget

from tui.charts import Chart, Dot

PADDING = 0.06
FRAME_ROWS = 6
"""Rows of the title, the frame and the labels under it."""
MARKS = (
    ("others", "○", "cyan", "tried"),
    ("front", "●", "green", "front"),
    ("unpruned", "◆", "magenta", "whole"),
    ("marked", "★", "yellow", "chosen"),
)
BUDGET_STYLE = "red"


class _Plot(PlotWidget, can_focus=False):
    """A plot without zoom: the screens have their own keys."""

    BINDINGS: ClassVar[list[BindingType]] = []


class Scatter(Vertical):
    """Draws a ``Chart``; its title says what the axes are, its key what the marks mean."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, classes="scatter")
        self._shown: Chart | None = None

    def compose(self) -> ComposeResult:
        yield Static("", classes="chart-title")
        yield Static("No model has been tried yet.", classes="chart-empty")
        yield _Plot(allow_pan_and_zoom=False)

    def on_mount(self) -> None:
        plot = self.query_one(_Plot)
        plot.margin_top, plot.margin_bottom, plot.margin_left = 1, 2, 7
        plot.display = False

    def show(self, chart: Chart) -> None:
        """Draw the chart, unless it is the one that is drawn already."""
        if chart == self._shown:
            return
        self._shown = chart
        self.query_one(".chart-title", Static).update(title(chart))
        self.query_one(".chart-empty").display = chart.empty
        plot = self.query_one(_Plot)
        plot.display = not chart.empty
        if not chart.empty:
            self._draw(plot, chart)

    def on_resize(self) -> None:
        """Draw again: the ticks depend on the height."""
        if self._shown is not None and not self._shown.empty:
            self._draw(self.query_one(_Plot), self._shown)

    def _draw(self, plot: _Plot, chart: Chart) -> None:
        dots = [dot for name, *_ in MARKS for dot in getattr(chart, name)]
        plot.clear()
        xs = [x for x, _ in dots]
        budget = chart.budget_x if chart.budget_x is not None and near(chart.budget_x, xs) else None
        xs += [budget] if budget is not None else []
        plot.set_xlimits(*padded(xs))
        low, high = padded([y for _, y in dots])
        plot.set_ylimits(low, high)
        rows = max(2, (self.size.height - FRAME_ROWS) // 2)
        plot.set_yticks(NumericAxisFormatter().get_ticks(low, high, max_ticks=rows))
        if budget is not None:
            plot.add_v_line(budget, line_style=BUDGET_STYLE)
        if len(chart.front) > 1:
            plot.plot(*columns(chart.front), line_style="green", hires_mode=HiResMode.BRAILLE)
        for name, mark, style, _ in MARKS:
            found: tuple[Dot, ...] = getattr(chart, name)
            if found:
                plot.scatter(*columns(found), marker=mark, marker_style=style)


def title(chart: Chart) -> Content:
    """What the axes are, and the key of the marks that occur."""
    key = [
        Content.assemble((mark, f"ansi_{style}"), f" {text}")
        for name, mark, style, text in MARKS
        if getattr(chart, name)
    ]
    if chart.budget_x is not None and not chart.empty:
        dots = [x for name, *_ in MARKS for x, _ in getattr(chart, name)]
        mark = "│" if near(chart.budget_x, dots) else "→" if chart.budget_x > max(dots) else "←"
        key.append(Content.assemble((mark, f"ansi_{BUDGET_STYLE}"), " budget"))
    return Content.assemble((chart.title, "bold"), "   ", Content("  ").join(key))


def near(x: float, others: list[float]) -> bool:
    """Whether a line at ``x`` can be drawn without squeezing the dots into a corner."""
    if not others:
        return False
    low, high = min(others), max(others)
    return low - (high - low) <= x <= high + (high - low)


def padded(values: list[float]) -> tuple[float, float]:
    """Limits of an axis that leave some room around the values."""
    low, high = min(values), max(values)
    room = (high - low) * PADDING or abs(high) * PADDING or 1.0
    return low - room, high + room


def columns(dots: tuple[Dot, ...]) -> tuple[list[float], list[float]]:
    return [x for x, _ in dots], [y for _, y in dots]
