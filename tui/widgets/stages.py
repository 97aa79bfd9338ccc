"""The stages of a run: finished ones in a line, the one at work with its bar and the time it has left."""

from __future__ import annotations

from collections.abc import Iterable

from textual.content import Content

from tui import words
from tui.progress import RunProgress, Stage
from tui.widgets.line import Line

BAR_CELLS = 24
NO_BREAK = "\u00a0"
SHORT = {
    "base": "load",
    "text": "text",
    "supernet": "tune",
    "export": "export",
    "references": "compare",
    "search": "search",
    "package": "package",
    "report": "report",
}


class Stages(Line):
    """Shows ``RunProgress.stages``."""

    def show(self, progress: RunProgress, now: float, ended: bool) -> None:
        """``now`` is seconds since 1970; ``ended`` says that nobody works on the run any more."""
        current = progress.current
        lines = [done_line((name, s) for name, s in progress.stages.items() if s.finished)]
        if current is not None:
            lines.append(stopped_line(current) if ended else work_line(current, now))
        if not progress.stages:
            lines.append(Content("No event has come yet." if ended else "Starting …"))
        self.update(Content("\n").join(line for line in lines if line.plain))


def done_line(stages: Iterable[tuple[str, Stage]]) -> Content:
    """``✓ load 3 s  ✓ text 40 s``."""
    parts = [
        Content.assemble(
            (f"✓{NO_BREAK}", "green"),
            SHORT.get(name, stage.title),
            ("" if stage.skipped else f" {words.duration(stage.seconds)}".replace(" ", NO_BREAK), "dim"),
        )
        for name, stage in stages
    ]
    return Content("  ").join(parts)


def work_line(stage: Stage, now: float) -> Content:
    """The stage at work: title, bar, count, time left."""
    count = f" {stage.done:,}/{stage.total:,} {stage.unit}" if stage.total else ""
    left = stage.seconds_left
    time = f", {words.duration(left)} left" if left is not None else f", {words.duration(now - stage.began)}"
    detail = f"  {stage.detail}" if stage.detail else ""
    return Content.assemble(
        ("▶ ", "bold green"), (stage.title, "bold"), " ", *bar(stage.share), count, time, detail
    )


def stopped_line(stage: Stage) -> Content:
    count = f" at {stage.done:,}/{stage.total:,} {stage.unit}" if stage.total else ""
    return Content.assemble(("■ ", "bold red"), (stage.title, "bold"), f" stopped{count}")


def bar(share: float | None) -> tuple[tuple[str, str], tuple[str, str]]:
    """A bar of ``BAR_CELLS``, in two pieces with their styles."""
    full = round((share or 0.0) * BAR_CELLS)
    return ("█" * full, "green"), ("░" * (BAR_CELLS - full), "dim")
