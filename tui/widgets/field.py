"""One line of a form: a label, a value to edit, its unit; the value is checked as it is typed."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.widgets import Input, Label

Kind = Literal["text", "number", "integer"]


class Field(Horizontal):
    """A labelled value. Numbers must be above zero unless ``minimum`` says otherwise."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("down", "app.focus_next", ""),
        ("up", "app.focus_previous", ""),
    ]

    class Changed(Message):
        """The person typed. ``value`` is None for an empty field; ``error`` says what is wrong with it."""

        def __init__(self, field: Field, value: float | int | str | None, error: str) -> None:
            super().__init__()
            self.field = field
            self.value = value
            self.error = error

        @property
        def control(self) -> Field:
            return self.field

    def __init__(
        self,
        label: str,
        name: str,
        *,
        kind: Kind = "text",
        unit: str = "",
        placeholder: str = "",
        minimum: float | None = None,
    ) -> None:
        super().__init__(id=f"field-{name}", classes="field")
        self.label = label
        self.key = name
        self.kind = kind
        self.unit = unit
        self.placeholder = placeholder
        self.minimum = minimum

    def compose(self) -> ComposeResult:
        yield Label(self.label, classes="field-label")
        yield Input(placeholder=self.placeholder, compact=True, id=f"input-{self.key}")
        if self.unit:
            yield Label(self.unit, classes="field-unit")

    @property
    def input(self) -> Input:
        return self.query_one(Input)

    @property
    def value(self) -> float | int | str | None:
        """What stands there, typed; None where it is empty or wrong."""
        return self._parsed()[0]

    @property
    def error(self) -> str:
        return self._parsed()[1]

    def show(self, value: float | int | str | None) -> None:
        """Put a value there without telling anybody; one that means the same is left as it was typed."""
        if value == self.value and value is not None:
            return
        with self.prevent(Input.Changed):
            self.input.value = "" if value is None else shown(value)
            self.set_class(False, "-wrong")

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        value, error = self._parsed()
        self.set_class(bool(error), "-wrong")
        self.post_message(self.Changed(self, value, error))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.screen.focus_next()

    def _parsed(self) -> tuple[float | int | str | None, str]:
        text = self.input.value.strip()
        if self.kind == "text" or not text:
            return text or None, ""
        try:
            number = int(text) if self.kind == "integer" else float(text)
        except ValueError:
            number = math.nan
        wanted = "a whole number" if self.kind == "integer" else "a number"
        if not math.isfinite(number):
            return None, f"{self.label}: '{text}' is not {wanted}"
        if self.minimum is None and number <= 0:
            return None, f"{self.label}: give {wanted} above 0, not {text}"
        if self.minimum is not None and number < self.minimum:
            return None, f"{self.label}: give {wanted} of at least {self.minimum:g}, not {text}"
        return number, ""


def shown(value: float | int | str) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)
