"""What every step shares: the trail on top, a line for messages, back and next, help."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Button, Static

from tui.screens.kept import Kept
from tui.widgets.keys import Keys
from tui.widgets.line import Line
from tui.widgets.trail import STEPS, Trail

if TYPE_CHECKING:
    from tui.app import Wizard

NAMES = [name for name, _ in STEPS]


class Step(Kept[None]):
    """One step of the wizard. Subclasses compose their content and say whether one may go on."""

    step: ClassVar[str]
    next_label: ClassVar[str] = "Next"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape", "back", "Back"),
        ("ctrl+n", "next", "Next"),
    ]

    @property
    def wizard(self) -> Wizard:
        from tui.app import Wizard

        assert isinstance(self.app, Wizard)
        return self.app

    def compose(self) -> ComposeResult:
        yield Trail(self.step)
        with Vertical(id="content", classes=f"step-{self.step}"):
            yield from self.content()
        yield Line("", id="message", markup=False)
        with Horizontal(id="ways"):
            if self.step != NAMES[0]:
                yield Button("‹ Back", id="back", compact=True)
            yield from self.actions()
            yield Static("", id="spacer")
            if self.step != NAMES[-1]:
                yield Button(f"{self.next_label} ›", id="next", variant="primary", compact=True)
        yield Keys()

    def content(self) -> ComposeResult:
        """The step's own widgets."""
        raise NotImplementedError

    def actions(self) -> ComposeResult:
        """Buttons of the step's own, between back and next."""
        yield from ()

    def refresh_facts(self) -> None:
        """Show what the wizard knows now; called when the step appears and when facts arrive."""

    def obstacle(self) -> str:
        """Why one cannot go on from here; empty if one can."""
        return ""

    def say(self, text: str, kind: str = "info") -> None:
        """Show one line under the content; ``kind`` is ``info``, ``warning`` or ``error``."""
        line = self.query_one("#message", Line)
        line.update(text)
        look = f"message-{kind}" if text else ""
        if look not in line.classes or not look:
            line.set_classes(look)

    def on_screen_resume(self) -> None:
        self.refresh_facts()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "back":
            self.action_back()
        elif event.button.id == "next":
            self.action_next()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The first step has nothing before it, the last nothing after it."""
        ends = {"back": NAMES[0], "next": NAMES[-1]}
        return ends.get(action) != self.step and super().check_action(action, parameters)

    def action_back(self) -> None:
        here = NAMES.index(self.step)
        if here:
            self.wizard.go(NAMES[here - 1])

    def action_next(self) -> None:
        problem = self.obstacle()
        if problem:
            self.say(problem, "error")
            return
        self.leave()

    def leave(self) -> None:
        """Go on to the next step."""
        self.wizard.go(NAMES[NAMES.index(self.step) + 1])
