"""The wizard's app: owns the choices, what is known of machine, model and run, and moves between steps."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.command import CommandInput, CommandList, CommandPalette, SearchIcon
from textual.events import Resize
from textual.screen import Screen
from textual.widgets import LoadingIndicator

from compressor.device import Machine
from compressor.errors import CompressorError
from compressor.request import stored_request
from compressor.runfolder import RunFolder
from tui.background import BackgroundRun
from tui.choices import Choices, of_request
from tui.driver import QuickDriver
from tui.endpoint import Endpoint
from tui.facts import ModelFacts
from tui.helptext import HELP
from tui.probe import Probe
from tui.screens.dialogs import HelpDialog, LeaveDialog, OpenRunDialog, TooSmallDialog
from tui.screens.registry import step_factory
from tui.screens.step import Step
from tui.widgets.trail import STEPS

if TYPE_CHECKING:
    from tui.results import Pick

SMALLEST = (80, 24)
DARK, LIGHT = "textual-dark", "textual-light"
ANSI_DARK, ANSI_LIGHT = "ansi-dark", "ansi-light"
HEAVY = ("tui.results", "tui.meaning", "tui.widgets.scatter")
BREATH_S = 0.05
"""Pause between the screens that are built ahead: keys come first."""


class Wizard(App[None]):
    """Seven steps over one set of choices. ``make_app`` builds it."""

    TITLE = "edge-compressor"
    CSS_PATH = "app.tcss"
    SCREENS: ClassVar[dict[str, Callable[[], Screen[Any]]]] = {
        **{name: step_factory(name) for name, _ in STEPS},
        "help": HelpDialog,
    }
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012 - as the base class declares it
    VERTICAL_BREAKPOINTS = [(0, "-low"), (34, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "help", "Help", priority=True),
        Binding("ctrl+o", "open_run", "Open run", show=False),
        Binding("ctrl+t", "toggle_theme", "Light/dark", show=False),
        Binding("ctrl+p", "command_palette", "Commands", priority=True),
        Binding("ctrl+q", "quit", "Quit", priority=True),
    ]

    def __init__(
        self, choices: Choices, probe: Probe, theme: str, attach: Path | None = None, ahead: bool = True
    ) -> None:
        super().__init__(driver_class=QuickDriver)
        self.animation_level = "none"
        self.choices = choices
        self.probe = probe
        self.machine: Machine | None = None
        self.model: ModelFacts | None = None
        self.run_at_work: BackgroundRun | None = None
        self.pick: Pick | None = None
        self.package: Path | None = None
        self.endpoint: Endpoint | None = None
        self._first_theme = theme
        self._run_to_open = attach
        self._ahead = ahead

    def on_mount(self) -> None:
        self.theme = self._first_theme
        self.push_screen("device")
        if self._run_to_open is not None:
            self.open_run(self._run_to_open)
        self.look_at_machine()
        self.look_at_model()
        if self._ahead:
            self.call_after_refresh(self.build_steps)

    def go(self, step: str) -> None:
        """Show a step; the one left keeps its state."""
        self.switch_screen(step)

    def open_run(self, path: Path) -> str:
        """Take over the choices of an existing run and go to where it stands. Returns what is wrong."""
        try:
            stored = stored_request(RunFolder.open_existing(path))
        except CompressorError as error:
            self.notify(str(error), severity="error", timeout=15)
            return str(error)
        self.choices = of_request(stored, path)
        self.pick, self.package = None, None
        self.run_at_work = BackgroundRun.attach(path)
        self.look_at_model()
        finished = RunFolder(path).front.exists() and self.run_at_work is None
        self.go("choose" if finished else "run")
        return ""

    def start_run(self) -> str:
        """Start what was chosen in a process of its own. Returns what stands in the way."""
        try:
            self.run_at_work = BackgroundRun.start(self.choices)
        except CompressorError as error:
            return str(error)
        self.choices = self.choices.in_folder(self.run_at_work.folder.path)
        return ""

    @property
    def has_result(self) -> bool:
        """Whether the chosen run went to its end."""
        run = self.choices.run
        at_work = self.run_at_work is not None and self.run_at_work.alive
        return run is not None and not at_work and RunFolder(run).front.exists()

    @work(exclusive=True, group="build")
    async def build_steps(self) -> None:
        """Build what was not shown yet, while the person reads, so that every screen comes at once."""
        for module in HEAVY:
            await asyncio.to_thread(import_module, module)
        for name in self.SCREENS:
            _, mounted = self._get_screen(name)
            await mounted()
            await asyncio.sleep(BREATH_S)
        windows = (CommandPalette(), SearchIcon(), CommandInput(), CommandList(), LoadingIndicator())
        for widget in windows:
            widget._post_register(self)
        self.stylesheet.parse()
        gc.collect()
        gc.freeze()  # what is built stays: no collection goes through it again while somebody waits

    @work(exclusive=True, group="machine")
    async def look_at_machine(self) -> None:
        try:
            self.machine = await self.probe.machine()
        except CompressorError as error:
            self.notify(str(error), severity="error", timeout=15)
            return
        self._tell_screen()

    @work(exclusive=True, group="model")
    async def look_at_model(self) -> None:
        """Learn the chosen model's shape; what is wrong with it, the model step says itself."""
        try:
            self.model = await self.probe.model(str(self.choices.value("model")))
        except CompressorError:
            self.model = None
        self._tell_screen()

    def _tell_screen(self) -> None:
        for screen in self.screen_stack:
            if isinstance(screen, Step) and screen.is_mounted:
                screen.refresh_facts()

    def on_resize(self, event: Resize) -> None:
        """Say so while the terminal is too small for the screens."""
        too_small = event.size.width < SMALLEST[0] or event.size.height < SMALLEST[1]
        shown = isinstance(self.screen, TooSmallDialog)
        if too_small and not shown:
            self.push_screen(TooSmallDialog(SMALLEST))
        elif shown and not too_small:
            self.pop_screen()

    async def action_help(self) -> None:
        if isinstance(self.screen, HelpDialog):
            self.pop_screen()
        elif isinstance(self.screen, Step):
            text = HELP[self.screen.step]
            await self.push_screen("help")
            assert isinstance(self.screen, HelpDialog)
            self.screen.tell(text)

    def action_toggle_theme(self) -> None:
        pairs = {DARK: LIGHT, LIGHT: DARK, ANSI_DARK: ANSI_LIGHT, ANSI_LIGHT: ANSI_DARK}
        self.theme = pairs.get(self.theme, DARK)

    @work
    async def action_open_run(self) -> None:
        path = await self.push_screen_wait(OpenRunDialog())
        if path is not None:
            self.open_run(path)

    @work
    async def action_quit(self) -> None:  # type: ignore[override]
        """Leave; ask first while a run is at work."""
        run = self.run_at_work
        if run is not None and run.alive:
            answer = await self.push_screen_wait(LeaveDialog(run.folder.path))
            if answer == "stay":
                return
            if answer == "stop":
                run.stop()
        self.exit()

    def on_unmount(self) -> None:
        """End what must not outlive the wizard: the endpoint. A run goes on."""
        if self.endpoint is not None:
            self.endpoint.stop()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        yield from super().get_system_commands(screen)
        yield SystemCommand("Open run", "Look at a run that exists, or go on with it", self.action_open_run)
        yield SystemCommand(
            "Light or dark", "Switch between the light and the dark look", self.action_toggle_theme
        )
        for name, title in STEPS:
            yield SystemCommand(f"Go to {title}", f"Show the step {title}", lambda name=name: self.go(name))


def make_app(
    attach: Path | None = None, probe: Probe | None = None, theme: str = DARK, ahead: bool = True
) -> Wizard:
    """The wizard, new or attached to a run folder; ``ahead`` builds its screens before they are shown."""
    return Wizard(Choices(), probe or Probe(), theme, attach, ahead)
