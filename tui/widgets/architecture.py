"""Draws a sub-network: a column a layer, as high as its MLP is wide; a gap where a layer was dropped."""

from __future__ import annotations

from textual.content import Content

from compressor.space import SubNetwork
from tui.widgets.line import Line

EIGHTHS = " ▁▂▃▄▅▆▇█"
ROWS = 4
FOUR_BIT_STYLE, STYLE, DROPPED_STYLE = "magenta", "green", "dim"


class Architecture(Line):
    """Shows one sub-network."""

    def show(self, subnet: SubNetwork, num_layers: int, intermediate_size: int) -> None:
        cell = 2 if 2 * num_layers <= max(60, self.size.width - 2) else 1
        self.update(drawing(subnet, num_layers, intermediate_size, cell))


def drawing(subnet: SubNetwork, num_layers: int, intermediate_size: int, cell: int = 1) -> Content:
    """The drawing, ``ROWS`` lines of columns, their numbers, and what the marks mean."""
    widths = dict(zip(subnet.layers, subnet.widths, strict=True))
    bits = dict(zip(subnet.layers, subnet.bits, strict=True))
    lines = []
    for row in reversed(range(ROWS)):
        parts = []
        for layer in range(num_layers):
            mark, style = column_cell(widths.get(layer), bits.get(layer, 8), intermediate_size, row)
            parts.append((mark * cell if cell == 1 else mark + " ", style))
        lines.append(Content.assemble(*parts))
    lines.append(Content.styled(ruler(num_layers, cell), "dim"))
    lines.append(Content(""))
    lines.append(caption(subnet, num_layers, intermediate_size))
    return Content("\n").join(lines)


def column_cell(width: int | None, bits: int, full: int, row: int) -> tuple[str, str]:
    """One cell of a layer's column, ``row`` 0 at the bottom, with its style."""
    if width is None:
        return ("·" if row == 0 else " "), DROPPED_STYLE
    eighths = max(1, round(width / full * ROWS * 8)) - 8 * row
    return EIGHTHS[max(0, min(8, eighths))], FOUR_BIT_STYLE if bits == 4 else STYLE


def ruler(num_layers: int, cell: int) -> str:
    """Layer numbers under every fifth column."""
    line = [" "] * (num_layers * cell + 4)
    for layer in range(0, num_layers, 5):
        for offset, digit in enumerate(str(layer)):
            line[layer * cell + offset] = digit
    return "".join(line).rstrip()


def caption(subnet: SubNetwork, num_layers: int, intermediate_size: int) -> Content:
    mean = sum(subnet.widths) / max(1, subnet.depth) / intermediate_size
    text = f"{subnet.depth} of {num_layers} layers, MLPs {mean:.0%} of {intermediate_size} wide on average"
    parts: list[tuple[str, str] | str] = [text]
    if subnet.depth < num_layers:
        parts.append(("  · dropped", DROPPED_STYLE))
    if 4 in subnet.bits:
        parts.append(("  █ in 4 bits", FOUR_BIT_STYLE))
    return Content.assemble(*parts)
