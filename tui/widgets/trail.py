"""The trail: all steps in one line, the one shown marked, those not reached yet dimmed."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

STEPS = (
    ("device", "Device"),
    ("model", "Model"),
    ("plan", "Plan"),
    ("run", "Run"),
    ("choose", "Choose"),
    ("package", "Package"),
    ("serve", "Serve"),
)


class Trail(Static):
    """``1 Device › 2 Model › ...`` with the current step in reverse."""

    def __init__(self, step: str) -> None:
        super().__init__(trail(step), id="trail")


def trail(step: str) -> Content:
    names = [name for name, _ in STEPS]
    here = names.index(step)
    parts = []
    for number, (_, title) in enumerate(STEPS):
        label = f" {number + 1} {title} "
        style = "bold reverse" if number == here else ("bold" if number < here else "dim")
        parts.append(Content.styled(label, style))
    return Content("›").join(parts)
