"""The pictures of architecture: the winner's layers, and what the front's sub-networks keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compressor.report.analysis import front_candidates, layer_statistics
from compressor.report.data import Candidate, ReportData
from compressor.report.style import PALETTE, new_figure
from compressor.space import SubNetwork

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")
MOST_ROWS = 40
"""Sub-networks of a front that one picture shows; of more, evenly spaced ones."""


def architecture(data: ReportData, subnet: SubNetwork) -> Figure:
    """Every layer of the super-network: the MLP width that the sub-network keeps, or its absence."""
    figure = new_figure((6.4, 3.0))
    axes = figure.subplots()
    kept = dict(zip(subnet.layers, zip(subnet.widths, subnet.bits, strict=True), strict=True))
    for layer in range(data.num_layers):
        axes.bar(
            layer, 100, width=0.82, facecolor="none", edgecolor=PALETTE["muted"], linewidth=0.7, linestyle=":"
        )
        if layer not in kept:
            axes.text(layer, 50, "×", ha="center", va="center", color=PALETTE["muted"], fontsize=11)
            continue
        width, bits = kept[layer]
        colour = PALETTE["winner"] if bits == 8 else PALETTE["front"]
        axes.bar(layer, 100 * width / data.intermediate_size, width=0.82, color=colour, zorder=3)
    _layer_axis(axes, data.num_layers)
    axes.set_ylim(0, 106)
    axes.set_ylabel("MLP width kept (%)")
    axes.grid(visible=False, axis="x")
    figure.legend(handles=_architecture_legend(subnet, data), loc="outside lower center", ncols=4)
    return figure


def front_layers(data: ReportData) -> Figure:
    """Above, how often the front keeps each layer; below, its sub-networks, the smallest on top."""
    front = front_candidates(data)
    shown = _evenly(front, MOST_ROWS)
    rows = max(2, len(shown))
    figure = new_figure((6.4, 2.6 + 0.17 * rows))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.25, 0.3 + 0.17 * rows])
    statistics = layer_statistics(front, data.num_layers, data.intermediate_size)
    above.bar(
        [s.layer for s in statistics],
        [100 * s.keep_share for s in statistics],
        width=0.82,
        color=PALETTE["front"],
        alpha=0.85,
    )
    above.set_ylim(0, 106)
    above.set_ylabel("kept by (%)")
    above.grid(visible=False, axis="x")
    for row, candidate in enumerate(shown):
        _draw_row(below, row, candidate, data.intermediate_size)
    below.set_ylim(rows - 0.5, -0.5)
    below.set_yticks(range(len(shown)), [f"{c.weight_bytes / 1e6:,.0f} MB" for c in shown], fontsize=7.5)
    below.tick_params(axis="y", length=0)
    below.grid(visible=False)
    below.spines["left"].set_visible(False)
    _layer_axis(below, data.num_layers)
    figure.legend(handles=_width_legend(shown, data.intermediate_size), loc="outside lower center", ncols=5)
    return figure


def loss_curves(data: ReportData) -> Figure:
    """Training loss of super-network and sub-network steps, and the smallest's on held-out rows."""
    figure = new_figure((6.4, 3.4))
    axes = figure.subplots()
    looks = {
        "super": ("front", "-", "super-network"),
        "sub": ("winner", "-", "random sub-network"),
        "held-out": ("reference", "--", "smallest sub-network, held-out rows"),
        "winner sub": ("over", "-", "the winner alone, later"),
        "winner held-out": ("over", "--", "the winner, held-out rows"),
    }
    for name, curve in data.loss_curves.items():
        colour, line, label = looks.get(name, ("reference", "--", name))
        if not curve:
            continue
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, color=PALETTE[colour], linewidth=0.8, alpha=0.35)
        axes.plot(steps, _smoothed(losses), color=PALETTE[colour], linestyle=line, linewidth=1.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _draw_row(axes: Axes, row: int, candidate: Candidate, full_width: int) -> None:
    for layer, width in zip(candidate.subnet.layers, candidate.subnet.widths, strict=True):
        shade = _shade(width / full_width)
        axes.add_patch(
            Rectangle(
                (layer - 0.41, row - 0.41), 0.82, 0.82, color=PALETTE["front"], alpha=shade, linewidth=0
            )
        )


def _shade(fraction: float) -> float:
    """Opacity that stands for a width: full width is solid."""
    return max(0.12, fraction**2)


def _layer_axis(axes: Axes, num_layers: int) -> None:
    axes.set_xlim(-0.7, num_layers - 0.3)
    axes.set_xlabel("layer of the unpruned model")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))


def _architecture_legend(subnet: SubNetwork, data: ReportData) -> list[Patch]:
    colours = {8: PALETTE["winner"], 4: PALETTE["front"]}
    handles = [Patch(color=colours[bits], label=f"kept, {bits} bits") for bits in sorted({*subnet.bits})]
    empty = Patch(
        facecolor="none", edgecolor=PALETTE["muted"], linestyle=":", linewidth=0.7, label="neurons removed"
    )
    dropped = data.num_layers - subnet.depth
    crossed = Patch(facecolor="none", edgecolor="none", label=f"×  layer removed ({dropped})")
    return [*handles, empty, *([crossed] if dropped else [])]


def _width_legend(shown: Sequence[Candidate], full_width: int) -> list[Patch]:
    widths = sorted({width for c in shown for width in c.subnet.widths})
    labelled = _evenly(widths, 4)
    handles = [
        Patch(
            color=PALETTE["front"],
            alpha=_shade(w / full_width),
            linewidth=0,
            label=f"{w / full_width:.0%} width",
        )
        for w in labelled
    ]
    return [*handles, Patch(facecolor="none", edgecolor="none", label="blank: removed")]


def _evenly(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, corrected for its start (Kingma and Ba, arXiv 1412.6980, section 3)."""
    smoothed, mean, share = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        share = weight * share + (1 - weight)
        smoothed.append(mean / share)
    return smoothed
