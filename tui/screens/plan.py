"""Step 3, plan: how much effort, what the run will do and take, the same as a command line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical, VerticalScroll
from textual.widgets import RadioSet, Static

from compressor.errors import CompressorError
from compressor.request import understand
from compressor.runfolder import RunFolder
from tui import words
from tui.background import refuse_unusable
from tui.facts import PlanFacts
from tui.screens.model import TYPING_PAUSE_S, press, radio
from tui.screens.step import Step
from tui.widgets.field import Field
from tui.widgets.line import Line

PRESET_TEXTS = (
    ("quick", "quick: see the whole way in minutes"),
    ("standard", "standard: a good result, an hour or a night"),
    ("paper", "paper: the effort of the method's authors, days"),
)
STAGE_NAMES = {
    "text": "write text",
    "supernet": "tune",
    "export": "export",
    "references": "measure the unpruned model",
    "search": "search",
    "winner": "tune the winner",
    "package": "package",
}


class PlanStep(Step):
    """Choose the effort; see what the run takes before it starts."""

    step = "plan"
    next_label = "Start"
    BINDINGS: ClassVar[list[BindingType]] = [("ctrl+y", "copy", "Copy line")]

    def __init__(self) -> None:
        super().__init__()
        self.asked = ""
        self.facts: PlanFacts | None = None
        self.fault = ""

    def content(self) -> ComposeResult:
        with VerticalScroll(id="plan-left", can_focus=False):
            yield Static("Effort", classes="heading")
            yield from radio("preset", PRESET_TEXTS)
            yield Field("Evaluations", "evaluations", kind="integer", unit="sub-networks")
            yield Field("Tuning at most", "tuning_minutes", kind="number", unit="min")
            yield Field("Run folder", "run")
        with VerticalScroll(id="plan-right", can_focus=False):
            yield Static("What will happen", classes="heading")
            yield Line("", id="figures", markup=False)
        with Vertical(id="line-box"):
            yield Line("", id="line", markup=False)

    def refresh_facts(self) -> None:
        choices = self.wizard.choices
        press(self, "preset", str(choices.value("preset")))
        self._show_effort()
        self._show_line()
        self._ask_if_changed()

    def on_radio_set_changed(self, event: RadioSet.Changed) -> None:
        preset = str(event.pressed.id).removeprefix("preset-")
        self.wizard.choices = self.wizard.choices.but(preset=preset, evaluations=None, tuning_minutes=None)
        self._show_effort()
        self._changed()

    def on_field_changed(self, event: Field.Changed) -> None:
        self.say(event.error, "error")
        if event.error:
            return
        if event.field.key == "run":
            run = Path(str(event.value)).expanduser() if event.value else None
            self.wizard.choices = self.wizard.choices.in_folder(run)
        else:
            self.wizard.choices = self.wizard.choices.but(**{event.field.key: event.value})
        self._changed()

    def obstacle(self) -> str:
        fault = next((f.error for f in self.query(Field) if f.error), "") or self.fault
        if not fault and self.facts is None:
            return "the plan is being made: wait a moment"
        return fault or self._folder_fault()

    def leave(self) -> None:
        fault = self.wizard.start_run()
        if fault:
            self.say(fault, "error")
        else:
            self.wizard.go("run")

    def action_copy(self) -> None:
        self.wizard.copy_to_clipboard(self.wizard.choices.command_line())
        self.notify("The command line is copied.", timeout=3)

    def _changed(self) -> None:
        self._show_line()
        self._ask_if_changed()

    def _show_effort(self) -> None:
        try:
            effort = self.wizard.choices.request().effort
        except CompressorError as error:
            self.say(str(error), "error")
            return
        self._field("evaluations").show(effort.evaluations)
        self._field("tuning_minutes").show(effort.tuning_minutes)

    def _show_line(self) -> None:
        try:
            line = self.wizard.choices.command_line()
            if not self._field("run").input.has_focus:
                self._field("run").show(str(self.wizard.choices.run_folder))
        except CompressorError as error:
            line = f"({error})"
        self.query_one("#line", Line).update(line)

    def _ask_if_changed(self) -> None:
        """Make the plan anew if it was made for other choices."""
        asked = self._request_text()
        if asked == self.asked:
            return
        self.asked, self.facts, self.fault = asked, None, ""
        self.query_one("#figures", Line).update("Making the plan …")
        self._make_plan()

    @work(exclusive=True, group="plan")
    async def _make_plan(self) -> None:
        await asyncio.sleep(TYPING_PAUSE_S / 2)
        choices = self.wizard.choices
        try:
            self.facts = await self.wizard.probe.plan(choices.request(), choices.run_folder)
        except CompressorError as error:
            self.fault = str(error)
            self.query_one("#figures", Line).update("It cannot be done like this.")
            self.say(self.fault, "error")
            return
        self.say("")
        self.query_one("#figures", Line).update(plan_lines(self.facts))

    def _request_text(self) -> str:
        """The request as text, to see whether it is another one."""
        try:
            return self.wizard.choices.request().model_dump_json()
        except CompressorError as error:
            return str(error)

    def _folder_fault(self) -> str:
        """What the run folder has against this run: another run, another model, another process."""
        choices = self.wizard.choices
        try:
            refuse_unusable(RunFolder(choices.run_folder))
            understand(choices.flags, choices.run_folder, resume=True)
        except CompressorError as error:
            return str(error)
        return ""

    def _field(self, name: str) -> Field:
        return self.query_one(f"#field-{name}", Field)


def plan_lines(facts: PlanFacts) -> str:
    """The plan in a few lines."""
    stages = ", ".join(
        f"{STAGE_NAMES.get(name, name)} {words.duration(seconds)}"
        for name, seconds in facts.stage_seconds.items()
    )
    lines = [
        f"Model     {facts.model}, {words.count(facts.parameters)} parameters, {facts.layers} layers",
        f"Space     {words.power(facts.distinct)} sub-networks: {span(facts.depths)} layers, "
        f"MLPs {span(facts.widths)} wide",
        f"Tries     {facts.evaluations} sub-networks, built, scored and measured here",
        f"Time      about {words.duration(facts.total_seconds)}: {stages}",
        f"Needs     {words.size(facts.peak_memory_bytes)} of memory at its peak, "
        f"{words.size(facts.disk_bytes)} of disk",
        f"Serving   whole model {words.size(facts.full_memory_bytes)}, "
        f"smallest {words.size(facts.smallest_memory_bytes)}",
    ]
    return "\n".join([*lines, *(f"Note      {warning}" for warning in facts.warnings)])


def span(values: tuple[int, ...]) -> str:
    """``21 to 30``, or the one value."""
    return f"{values[0]} to {values[-1]}" if len(values) > 1 else str(values[0])
