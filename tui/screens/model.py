"""Step 2, model and data: what to compress, what accuracy means, what to train on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from textual import work
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Button, RadioButton, RadioSet, Static

from compressor.errors import CompressorError
from compressor.request import AGREEMENT
from tui import words
from tui.facts import ModelFacts
from tui.screens.dialogs import PathDialog
from tui.screens.step import Step
from tui.widgets.choice import Choice
from tui.widgets.field import Field
from tui.widgets.line import Line

TYPING_PAUSE_S = 0.6
SOURCES = (
    ("starter", "Starter: SmolLM2-135M-Instruct, comes with the program"),
    ("folder", "Hugging Face folder on this disk"),
    ("gguf", "GGUF file"),
    ("hub", "Model of the Hugging Face hub"),
)
ACCURACIES = (
    ("agreement", "Agreement with the whole model: no data needed, seconds a candidate"),
    ("paper", "The paper's five tasks: their data needed, a minute a candidate or more"),
    ("tasks", "lm-eval tasks of your choice: the more items, the longer"),
)
TRAINING = (("free", "Data-free: the model writes its own text"), ("own", "A file, or a hub data set"))
PLACEHOLDERS = {"folder": "path of the folder", "gguf": "path of the .gguf file", "hub": "owner/name"}


class ModelStep(Step):
    """Name the model and say what counts; the model is checked as it is named."""

    step = "model"

    def __init__(self) -> None:
        super().__init__()
        self.checked = ""
        self.fault = ""

    def content(self) -> ComposeResult:
        with VerticalScroll(id="model-left", can_focus=False):
            yield Static("Model", classes="heading")
            yield from radio("source", SOURCES)
            with Vertical(id="source-path"):
                yield Field("Where", "model", placeholder=PLACEHOLDERS["folder"])
                yield Button("Browse …", id="browse", compact=True)
            yield Line("", id="verdict", markup=False)
        with VerticalScroll(id="model-right", can_focus=False):
            yield Static("Accuracy: what the search keeps high", classes="heading")
            yield from radio("accuracy", ACCURACIES)
            with Vertical(id="task-fields"):
                yield Field("Tasks", "tasks", placeholder="arc_easy,winogrande")
                yield Field("Their data", "task_data", placeholder="folder; empty: the hub")
                yield Field("Items a task", "limit", kind="integer", placeholder="all")
                yield Field(
                    "Few-shot", "num_fewshot", kind="integer", minimum=0, placeholder="the task's own"
                )
            yield Static("Training data", classes="heading")
            yield from radio("training", TRAINING)
            yield Field("Data", "train_data", placeholder="Alpaca JSON(L), text file or hub id")

    def refresh_facts(self) -> None:
        asked = self.wizard.choices.value
        model = str(asked("model"))
        tasks = str(asked("tasks") or AGREEMENT)
        press(self, "source", source_kind(model) if self.pressed("source") in ("", "starter") else "")
        press(self, "accuracy", tasks if tasks in ("agreement", "paper") else "tasks")
        press(self, "training", "own" if asked("train_data") else self.pressed("training") or "free")
        self._field("model").show(None if model == "starter" else model)
        self._field("tasks").show(None if tasks in ("agreement", "paper") else tasks)
        for name in ("task_data", "limit", "num_fewshot", "train_data"):
            self._field(name).show(asked(name))
        self._lay_out()
        if self.wizard.model is not None and self.checked != model:
            self.checked = model
            self._show_verdict(self.wizard.model)

    def pressed(self, group: str) -> str:
        """The choice of a group of radio buttons, by its name."""
        button = self.query_one(f"#{group}", RadioSet).pressed_button
        return str(button.id).removeprefix(f"{group}-") if button else ""

    def on_radio_set_changed(self, event: RadioSet.Changed) -> None:
        choices = self.wizard.choices
        group = event.radio_set.id
        if group == "source":
            self._choose_model("starter" if self.pressed("source") == "starter" else self._typed("model"))
        elif group == "accuracy":
            kind = self.pressed("accuracy")
            asked = {"agreement": None, "paper": "paper"}.get(kind, self._typed("tasks"))
            self.wizard.choices = choices.but(tasks=asked)
        elif self.pressed("training") == "free":
            self.wizard.choices = choices.but(train_data=None)
        else:
            self.wizard.choices = choices.but(train_data=self._typed("train_data"))
        self._lay_out()
        self.say(self._field_fault(), "error")

    def on_field_changed(self, event: Field.Changed) -> None:
        self.say(event.error, "error")
        if event.error:
            return
        if event.field.key == "model":
            self._choose_model(event.value)
        else:
            self.wizard.choices = self.wizard.choices.but(**{event.field.key: event.value})

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "browse":
            event.stop()
            self._browse()
        else:
            super().on_button_pressed(event)

    def obstacle(self) -> str:
        if self.pressed("source") != "starter" and not self._typed("model"):
            return "name the model: a path, or owner/name for the hub"
        if self.pressed("accuracy") == "tasks" and not self._typed("tasks"):
            return "name at least one lm-eval task, or choose agreement"
        if self.pressed("training") == "own" and not self._typed("train_data"):
            return "name the training data, or choose data-free"
        return self._field_fault() or self.fault or self._core_fault()

    def _choose_model(self, model: object) -> None:
        self.fault = ""
        if model in (None, self.wizard.choices.value("model")):
            return
        self.wizard.choices = self.wizard.choices.but(model=model).in_folder(None)
        self.wizard.model = None
        self.checked = ""
        self.query_one("#verdict", Line).update("Checking …")
        self._check(str(model))

    @work(exclusive=True, group="check")
    async def _check(self, model: str) -> None:
        """See whether the model exists and can be used, once typing has paused."""
        await asyncio.sleep(TYPING_PAUSE_S)
        try:
            found = await self.wizard.probe.model(model)
        except CompressorError as error:
            self.fault = str(error)
            self.query_one("#verdict", Line).update(f"✗ {self.fault}")
            return
        self.wizard.model = found
        self.checked = model
        self._show_verdict(found)

    @work
    async def _browse(self) -> None:
        folders = self.pressed("source") == "folder"
        title = "The model's folder" if folders else "The model's .gguf file"
        path = await self.wizard.push_screen_wait(PathDialog(title, folders, () if folders else (".gguf",)))
        if path is not None:
            self._field("model").show(str(path))
            self._choose_model(str(path))

    def _show_verdict(self, model: ModelFacts) -> None:
        license_name = f", licence {model.license}" if model.license else ""
        self.query_one("#verdict", Line).update(
            f"✓ {model.name}: {words.count(model.parameters)} parameters, {model.shape.num_layers} layers, "
            f"hidden {model.shape.hidden_size}, MLP {model.shape.intermediate_size}{license_name}"
        )

    def _lay_out(self) -> None:
        """Show the fields that the choices call for."""
        source = self.pressed("source")
        self.query_one("#source-path").display = source not in ("", "starter")
        self.query_one("#browse").display = source in ("folder", "gguf")
        self._field("model").input.placeholder = PLACEHOLDERS.get(source, "")
        self.query_one("#task-fields").display = self.pressed("accuracy") != "agreement"
        self._field("tasks").display = self.pressed("accuracy") == "tasks"
        self._field("train_data").display = self.pressed("training") == "own"

    def _field(self, name: str) -> Field:
        return self.query_one(f"#field-{name}", Field)

    def _typed(self, name: str) -> str | None:
        value = self._field(name).value
        return None if value is None else str(value)

    def _field_fault(self) -> str:
        faults = (field.error for field in self.query(Field) if field.display)
        data = self._typed("task_data") if self.pressed("accuracy") != "agreement" else None
        if data and not Path(data).expanduser().is_dir():
            return f"Their data: there is no folder {data}"
        return next((fault for fault in faults if fault), "")

    def _core_fault(self) -> str:
        try:
            self.wizard.choices.request()
        except CompressorError as error:
            return str(error)
        return ""


def radio(group: str, choices: tuple[tuple[str, str], ...]) -> ComposeResult:
    """A group of radio buttons with the first one pressed."""
    with RadioSet(id=group, compact=True):
        for number, (name, text) in enumerate(choices):
            yield Choice(text, value=number == 0, id=f"{group}-{name}")


def press(screen: Step, group: str, name: str) -> None:
    """Press a radio button as if nobody had; an empty name leaves the group as it is."""
    if name:
        with screen.prevent(RadioSet.Changed):
            screen.query_one(f"#{group}-{name}", RadioButton).value = True


def source_kind(model: str) -> str:
    """Which kind of source a name looks like."""
    if model == "starter":
        return "starter"
    if model.endswith(".gguf"):
        return "gguf"
    return "folder" if Path(model).expanduser().exists() or model.startswith(("/", ".", "~")) else "hub"
