"""Text that changes while one looks: drawn anew only where it has become another one."""

from __future__ import annotations

from textual.content import Content
from textual.visual import VisualType
from textual.widgets import Static


class Line(Static):
    """A ``Static`` whose ``update`` with what it shows already costs nothing."""

    def update(self, content: VisualType = "", *, layout: bool = True) -> None:
        if not same(content, self.content):
            super().update(content, layout=layout)


def same(one: VisualType, other: VisualType) -> bool:
    """Whether two contents look the same: text and styles (``==`` compares the text of ``Content`` alone)."""
    if isinstance(one, Content) and isinstance(other, Content):
        return one.is_same(other)
    return isinstance(one, str) and isinstance(other, str) and one == other
