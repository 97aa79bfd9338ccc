"""How the pictures look: one palette for PNG and page, and places for labels that hide nothing.

Colours are of Okabe and Ito's set, which colour-blind readers tell apart; marks differ in shape too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE: Mapping[str, str] = {
    "ink": "#1f2933",
    "muted": "#5f6b7a",
    "grid": "#e3e7ec",
    "surface": "#ffffff",
    "candidate": "#7fa8c9",
    "over": "#a3a8b0",
    "front": "#0072b2",
    "winner": "#d55e00",
    "reference": "#007a5a",
    "budget": "#9c4f8b",
}
"""Each colour has one meaning; the page swaps them by name for dark surfaces."""

WIDE = (6.4, 4.4)
"""Inches of a picture that fills a column."""
PNG_DPI = 180
LABEL_OFFSETS = (
    *((9, 7), (9, -13), (-9, 7), (-9, -13), (0, 12), (0, -18)),
    *((14, 18), (-14, 18), (14, -26), (-14, -26), (0, 26), (0, -32), (24, 34), (-24, 34)),
)
"""Points from a mark to its label, in the order they are tried."""

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": PALETTE["ink"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelpad": 7,
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "figure.facecolor": PALETTE["surface"],
    "legend.frameon": False,
    "legend.fontsize": 8.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "edge-compressor",
}


@contextmanager
def styled() -> Iterator[None]:
    """Pictures made inside look alike; settings of the caller stay untouched."""
    with matplotlib.rc_context(_RC):
        yield


def new_figure(size: tuple[float, float] = WIDE) -> Figure:
    """A figure outside pyplot's registry, so that nothing is left open."""
    return Figure(figsize=size, layout="constrained")


def place_labels(
    axes: Axes,
    labels: Sequence[tuple[float, float, str, str]],
    marks: Sequence[tuple[float, float]],
    rows: Sequence[float] = (),
    columns: Sequence[float] = (),
) -> None:
    """Write labels (x, y, text, colour) beside their marks where they hide neither marks nor each other.

    ``marks`` are further data points to keep clear of, ``rows`` and ``columns`` lines across the
    picture. Where every place is taken, the one that hides least is used. Axis limits must be final.
    """
    axes.figure.canvas.draw()
    inside = axes.get_window_extent()
    taken = [_box_around(axes, x, y) for x, y in [*marks, *((x, y) for x, y, _, _ in labels)]]
    taken += [_across(_box_around(axes, axes.get_xlim()[0], y, 2.0), inside) for y in rows]
    taken += [_along(_box_around(axes, x, axes.get_ylim()[0], 3.0), inside) for x in columns]
    for x, y, text, colour in labels:
        tried = []
        for dx, dy in LABEL_OFFSETS:
            label = axes.annotate(
                text,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                color=colour,
                fontsize=9,
                linespacing=1.25,
                zorder=9,
            )
            box = label.get_window_extent().padded(1)
            cost = sum(_overlap(box, other) for other in taken) + 50 * _outside(box, inside)
            tried.append((cost, label, box))
            if cost == 0:
                break
        cost, chosen, box = min(tried, key=lambda entry: entry[0])
        for _, label, _ in tried:
            if label is not chosen:
                label.remove()
        taken.append(box)


def _box_around(axes: Axes, x: float, y: float, points: float = 4.5) -> Bbox:
    px, py = axes.transData.transform((x, y))
    reach = points * axes.figure.dpi / 72
    return Bbox.from_extents(px - reach, py - reach, px + reach, py + reach)


def _across(box: Bbox, frame: Bbox) -> Bbox:
    """The box from the left of the frame to its right."""
    return Bbox.from_extents(frame.x0, box.y0, frame.x1, box.y1)


def _along(box: Bbox, frame: Bbox) -> Bbox:
    """The box from the bottom of the frame to its top."""
    return Bbox.from_extents(box.x0, frame.y0, box.x1, frame.y1)


def _overlap(one: Bbox, other: Bbox) -> float:
    """Pixels that two boxes share."""
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)


def _outside(box: Bbox, frame: Bbox) -> float:
    """Pixels of ``box`` that lie outside ``frame``."""
    return max(0.0, float(box.width * box.height) - _overlap(box, frame))
