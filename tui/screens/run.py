"""Step 4, run: stages, the front as it grows, the log; pause, go on, stop and keep."""

from __future__ import annotations

import time
from typing import ClassVar

from rich.markup import escape
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widgets import Button, RichLog, Static

from compressor.errors import CompressorError
from compressor.request import AGREEMENT
from compressor.runfolder import RunFolder
from tui import words
from tui.background import BackgroundRun, Ending, last_complaint
from tui.charts import VIEWS, Sample, make_chart
from tui.follow import EventFile
from tui.progress import Point, RunProgress
from tui.results import unpruned_samples, weight_budget_bytes
from tui.screens.step import Step
from tui.widgets.line import Line
from tui.widgets.scatter import Scatter
from tui.widgets.stages import Stages

LOOK_EVERY_S = 0.4
LOG_LINES = 500


class RunStep(Step):
    """Watches a run that works in a process of its own."""

    step = "run"
    next_label = "Choose"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("v", "view", "Chart"),
        ("p", "pause", "Pause"),
        ("s", "stop", "Stop"),
        ("r", "restart", "Go on"),
        ("f", "finish", "Finish"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.view = VIEWS[0]
        self.progress = RunProgress()
        self.events: EventFile | None = None
        self.run: BackgroundRun | None = None
        self.unpruned: tuple[Sample, ...] = ()
        self.logged = 0
        self.was_alive = False

    def content(self) -> ComposeResult:
        yield Stages("No run has been started: go back to the plan, or open one with Ctrl+O.", id="stages")
        yield Line("", id="best")
        yield Scatter(id="front")
        yield RichLog(id="log", max_lines=LOG_LINES, wrap=True, markup=True)

    def actions(self) -> ComposeResult:
        yield Button("Pause", id="pause", compact=True)
        yield Button("Stop, keep", id="stop", compact=True)
        yield Button("Go on", id="restart", compact=True)
        yield Button("Finish with these", id="finish", compact=True)

    def on_mount(self) -> None:
        self._show_buttons(alive=False)
        self.query_one("#log").can_focus = False
        self.set_interval(LOOK_EVERY_S, self.look)

    def refresh_facts(self) -> None:
        run = self.wizard.run_at_work
        folder = self.wizard.choices.run
        if folder is not None and (self.events is None or self.events.path.parent != folder):
            self._turn_to(EventFile(folder / "events.jsonl"))
        if run is not self.run:
            self.run = run
            self.say("")
        self.look()
        self._show_chart()

    def look(self) -> None:
        """Take in what the run has told since the last look, and show it."""
        if self.events is None:
            return
        if not self.progress.num_layers and self.wizard.model is not None:
            shape = self.wizard.model.shape
            self.progress.num_layers, self.progress.intermediate_size = (
                shape.num_layers,
                shape.intermediate_size,
            )
        news = self.events.new()
        for moment, event in news:
            self.progress.see(moment, event)
        if self.is_current:
            self._show(bool(news))

    def obstacle(self) -> str:
        if not self.wizard.has_result:
            return "there is nothing to choose from yet: wait for the run's end, or stop it"
        return ""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys that do nothing at the moment are not shown."""
        alive = self.run is not None and self.run.alive
        stopped = not alive and self.events is not None and not self.wizard.has_result
        able = {
            "pause": alive,
            "stop": alive,
            "restart": stopped,
            "finish": stopped and bool(self.progress.points),
        }
        return able.get(action, True) and super().check_action(action, parameters)

    def action_view(self) -> None:
        self.view = VIEWS[1 - VIEWS.index(self.view)]
        self._show_chart()

    def action_pause(self) -> None:
        if self.run is None or not self.run.alive:
            return
        if self.run.paused:
            self.run.resume()
        else:
            self.run.pause()
        self.set_timer(0.1, lambda: self._show(False))

    def action_stop(self) -> None:
        if self.run is not None and self.run.alive:
            self.run.stop()
            self.say("Stopping: what is finished is kept.")

    def action_restart(self) -> None:
        if self.events is None or (self.run is not None and self.run.alive):
            return
        fault = self.wizard.start_run()
        self.say(fault, "error")
        self.refresh_facts()

    def action_finish(self) -> None:
        """Go on with a stopped run, but ask for no more than was evaluated: choose, package, report."""
        if self.progress.points and not (self.run is not None and self.run.alive):
            self.wizard.choices = self.wizard.choices.but(evaluations=len(self.progress.points))
            self.action_restart()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        actions = {
            "pause": self.action_pause,
            "stop": self.action_stop,
            "restart": self.action_restart,
            "finish": self.action_finish,
        }
        action = actions.get(str(event.button.id))
        if action is None:
            super().on_button_pressed(event)
        else:
            event.stop()
            action()

    def _turn_to(self, events: EventFile) -> None:
        """Forget the run that was shown and show another one."""
        self.events, self.progress, self.unpruned, self.logged = events, RunProgress(), (), 0
        self.query_one("#log", RichLog).clear()

    def _show(self, news: bool) -> None:
        alive = self.run is not None and self.run.alive
        self.query_one(Stages).show(self.progress, time.time(), ended=not alive)
        self._show_buttons(alive)
        self._show_ending(alive)
        if news:
            self.query_one("#best", Line).update(best_line(self.progress.best))
            self._show_log()
            self._show_chart()

    def _show_buttons(self, alive: bool) -> None:
        if alive != self.was_alive:
            self.was_alive = alive
            self.refresh_bindings()
        paused = alive and self.run is not None and self.run.paused
        pause = self.query_one("#pause", Button)
        pause.display = alive
        pause.label = "Go on" if paused else "Pause"
        self.query_one("#stop").display = alive
        stopped = not alive and self.events is not None and not self.wizard.has_result
        self.query_one("#restart").display = stopped
        self.query_one("#finish").display = stopped and bool(self.progress.points)
        if paused:
            self.say("Paused: P goes on.", "warning")
        elif alive and "Paused" in str(self.query_one("#message", Static).content):
            self.say("")

    def _show_ending(self, alive: bool) -> None:
        """Once the process is gone, say how it ended and what can be done."""
        if alive or self.events is None:
            return
        if self.progress.verdict is not None:
            met = self.progress.verdict.get("budgets_met", True)
            self.say(
                "Done: every budget is met. Go on with Ctrl+N." if met else MISSED,
                "info" if met else "warning",
            )
            return
        folder = RunFolder(self.events.path.parent)
        ending = self.run.ending() if self.run is not None else Ending(None, last_complaint(folder))
        if ending.failed:
            cause = ending.complaint or f"its process ended with code {ending.code}"
            self.say(f"The run failed: {cause} (Esc: change the plan; R: try again)", "error")
        else:
            self.say(
                "Stopped. What is finished is kept: R goes on, F finishes with what there is.", "warning"
            )

    def _show_log(self) -> None:
        log = self.query_one("#log", RichLog)
        for level, text in self.progress.log[self.logged :]:
            mark = "[bold yellow]![/] " if level == "warning" else "[dim]·[/] "
            log.write(mark + escape(text))
        self.logged = len(self.progress.log)

    def _show_chart(self) -> None:
        folder = self.wizard.choices.run
        try:
            request = self.wizard.choices.request()
        except CompressorError:
            return
        if not self.unpruned and folder is not None and self.progress.points:
            self.unpruned = unpruned_samples(folder, request, self.wizard.model)
        name = "Agreement" if request.tasks == (AGREEMENT,) else "Accuracy"
        points = [p for p in self.progress.points.values() if not p.failed]
        self.query_one(Scatter).show(
            make_chart(
                self.view,
                name,
                [sample(p) for p in points],
                self.unpruned,
                weight_budget_bytes=weight_budget_bytes(request, self.wizard.model),
            )
        )


MISSED = "Done, but a budget is missed: see the figures and what would help in the next step (Ctrl+N)."


def sample(point: Point) -> Sample:
    return Sample(point.accuracy, point.weight_bytes, point.throughput_tok_s)


def best_line(best: Point | None) -> str:
    """The best sub-network so far in one line."""
    if best is None:
        return ""
    return (
        f"Best so far: {words.percent(best.accuracy)} at {words.size(best.weight_bytes)}, "
        f"{words.rate(best.throughput_tok_s)}, {best.subnet.depth} layers"
    )
