"""The run's events as a terminal shows them: a progress line a stage, then the verdict."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from compressor.events import (
    CandidateEvaluated,
    Event,
    Listener,
    LossReported,
    Message,
    StageFinished,
    StageProgress,
    StageStarted,
)

PLAIN_INTERVAL_S = 10.0


@contextmanager
def terminal_listener(console: Console) -> Iterator[Listener]:
    """A listener that draws progress bars on a terminal, or prints lines now and then elsewhere."""
    if not console.is_terminal:
        yield PlainProgress(console)
        return
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
    )
    with progress:
        yield BarProgress(progress)


class BarProgress:
    """One bar a stage."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}
        self.best = BestSoFar()

    def __call__(self, event: Event) -> None:
        match event:
            case StageStarted():
                self.tasks[event.stage] = self.progress.add_task(
                    event.title, total=event.total or None, detail=""
                )
            case StageProgress() if event.stage in self.tasks:
                detail = event.detail or self.best.line
                self.progress.update(
                    self.tasks[event.stage], completed=event.done, total=event.total or None, detail=detail
                )
            case StageFinished() if event.stage in self.tasks:
                task = self.tasks[event.stage]
                total = self.progress.tasks[task].total or 1
                note = "already done" if event.skipped else f"{event.seconds:.0f} s"
                self.progress.update(task, total=total, completed=total, detail=note)
                self.progress.stop_task(task)
            case CandidateEvaluated():
                self.best.see(event)
            case Message():
                self.progress.console.print(message_line(event), highlight=False)


class PlainProgress:
    """A line when a stage starts and ends, and one every few seconds in between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started: dict[str, tuple[str, float]] = {}
        self.last = 0.0
        self.loss = ""
        self.best = BestSoFar()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case StageStarted():
                self.started[event.stage] = (event.title, now)
                self.last = now
                self._line(f"{event.title} ...")
            case StageProgress() if now - self.last >= PLAIN_INTERVAL_S:
                self.last = now
                self._line(self._progress_line(event, now))
            case StageFinished():
                title = self.started.get(event.stage, (event.stage, now))[0]
                self._line(
                    f"{title}: already done" if event.skipped else f"{title}: done in {event.seconds:.0f} s"
                )
            case LossReported():
                self.loss = f"{event.network} loss {event.loss:.3f}"
            case CandidateEvaluated():
                self.best.see(event)
            case Message():
                self._line(message_line(event))

    def _progress_line(self, event: StageProgress, now: float) -> str:
        title, began = self.started.get(event.stage, (event.stage, now))
        seconds = max(now - began, 1e-6)
        left = ""
        if event.total and event.done:
            left = f", {(event.total - event.done) * seconds / event.done:.0f} s left"
        total = f"/{event.total}" if event.total else ""
        rate = f", {event.done / seconds:.2f}/s" if event.done else ""
        detail = event.detail or self.best.line
        return f"  {title}: {event.done}{total}{rate}{left}{'  ' + detail if detail else ''}"

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class BestSoFar:
    """Remembers the most accurate sub-network evaluated so far, as a few words."""

    def __init__(self) -> None:
        self.accuracy = float("-inf")
        self.line = ""

    def see(self, event: CandidateEvaluated) -> None:
        accuracy = event.values.get("accuracy")
        if event.failed or accuracy is None or accuracy <= self.accuracy:
            return
        self.accuracy = accuracy
        megabytes = event.values.get("weight_bytes", 0) / 1e6
        self.line = f"best {accuracy:.3f} at {megabytes:.0f} MB"


def message_line(event: Message) -> str:
    return f"warning: {event.text}" if event.level == "warning" else event.text
