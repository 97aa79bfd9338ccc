"""Step 1, device: what this machine is, the profiles that fit it, budgets and workload."""

from __future__ import annotations

from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from compressor.device import GIB, Fit, Machine, fits
from compressor.errors import CompressorError
from compressor.profile import Profile, load_profile, load_profiles
from tui import words
from tui.screens.dialogs import PathDialog
from tui.screens.step import Step
from tui.widgets.field import Field
from tui.widgets.line import Line

FIELDS = (
    ("Memory", "memory_budget", "number", "GiB"),
    ("Prompt", "prompt_tokens", "integer", "tokens"),
    ("First token in", "ttft_budget", "number", "ms"),
    ("Answer", "output_tokens", "integer", "tokens"),
    ("Each token in", "tpot_budget", "number", "ms"),
    ("At once", "concurrency", "integer", "requests"),
)


OWN_FILE = "own-file"


class DeviceStep(Step):
    """Pick the profile of the device that will serve; narrow or widen its budgets."""

    step = "device"
    BINDINGS: ClassVar[list[BindingType]] = [("ctrl+o", "app.open_run", "Open run")]

    def __init__(self) -> None:
        super().__init__()
        self.profiles: list[Profile] = []

    def content(self) -> ComposeResult:
        with Vertical(id="device-left"):
            yield Line("Looking at this machine …", id="machine", markup=False)
            yield OptionList(id="profiles", compact=True)
        with VerticalScroll(id="device-right", can_focus=False):
            yield Static("Limits, and what one request is", classes="heading")
            for left, right in zip(FIELDS[::2], FIELDS[1::2], strict=True):
                with Horizontal(classes="pair"):
                    for label, name, kind, unit in (left, right):
                        yield Field(label, name, kind=kind, unit=unit)  # type: ignore[arg-type]
            yield Line("", id="meaning")

    def refresh_facts(self) -> None:
        machine = self.wizard.machine
        if machine is not None and not self.profiles:
            self._list_profiles(machine)
        self._show_choices()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        name = str(event.option.id)
        if name == OWN_FILE:
            return
        if self.wizard.choices.value("profile") == name:
            return
        overrides = {field: None for _, field, _, _ in FIELDS}
        self.wizard.choices = self.wizard.choices.but(profile=name, **overrides)
        self._show_choices()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        if event.option.id == OWN_FILE:
            self._browse()
        else:
            self.query_one("#input-memory_budget").focus()

    def on_field_changed(self, event: Field.Changed) -> None:
        if not event.error:
            self.wizard.choices = self.wizard.choices.but(**{event.field.key: event.value})
        self._judge()

    def obstacle(self) -> str:
        if self.wizard.machine is None:
            return "still looking at this machine: wait a moment"
        return next((f.error for f in self.query(Field) if f.error), "") or self._fault()

    @work
    async def _browse(self) -> None:
        """Take a profile from a TOML file; one that is wrong is named and not taken."""
        path = await self.wizard.push_screen_wait(PathDialog("A profile of your own", False, (".toml",)))
        if path is None or self.wizard.machine is None:
            return
        try:
            load_profile(str(path))
        except CompressorError as error:
            self.say(str(error), "error")
            return
        self.wizard.choices = self.wizard.choices.but(
            profile=str(path), **{name: None for _, name, _, _ in FIELDS}
        )
        self._list_profiles(self.wizard.machine)
        self._show_choices()

    def _list_profiles(self, machine: Machine) -> None:
        shipped = load_profiles()
        own = self._own_profile([p.name for p in shipped])
        fit = {p.name: fits(p, machine) for p in (*own, *shipped)}
        by_memory = sorted(shipped, key=lambda p: (not fit[p.name].ok, p.device.memory_gib))
        self.profiles = [*own, *by_memory]
        self.query_one("#machine", Line).update(machine_lines(machine))
        chosen = self.wizard.choices.value("profile")
        if chosen is None:
            chosen = next((p.name for p in self.profiles if fit[p.name].ok), self.profiles[0].name)
            self.wizard.choices = self.wizard.choices.but(profile=chosen)
        names = {p.name: str(chosen) if p in own else p.name for p in self.profiles}
        options = self.query_one("#profiles", OptionList)
        options.clear_options()
        options.add_options(Option(profile_line(p, fit[p.name]), id=names[p.name]) for p in self.profiles)
        options.add_option(Option("… a profile file of your own (Enter)", id=OWN_FILE))
        options.highlighted = options.get_option_index(names.get(str(chosen), str(chosen)))
        options.focus()

    def _own_profile(self, shipped: list[str]) -> list[Profile]:
        """The profile of the choices, where it is not one of those that come with the program."""
        if self.wizard.choices.value("profile") is None:
            return []
        try:
            profile = self.wizard.choices.request().profile
        except CompressorError:
            return []
        return [] if profile.name in shipped else [profile]

    def _show_choices(self) -> None:
        try:
            profile = self.wizard.choices.request().profile
        except CompressorError as error:
            self.say(str(error), "error")
            return
        figures = {
            "memory_budget": profile.budgets.memory_gib,
            "ttft_budget": profile.budgets.ttft_ms,
            "tpot_budget": profile.budgets.tpot_ms,
            **profile.workload.model_dump(),
        }
        if self.wizard.machine is not None:
            for field in self.query(Field):
                field.show(figures[field.key])
        self._judge()

    def _judge(self) -> None:
        """Say what is wrong, or what the budgets mean for the model."""
        fault = next((f.error for f in self.query(Field) if f.error), "") or self._fault()
        self.say(fault, "error")
        if fault:
            return
        self.query_one("#meaning", Line).update(self._meaning())

    def _meaning(self) -> str:
        """What the budgets mean for the model, once it is known."""
        model = self.wizard.model
        if model is None:
            return "What this means for a model is said here once the model is known."
        from tui.meaning import budget_meaning  # with numpy, which the first screen does not wait for

        return budget_meaning(self.wizard.choices.request().profile, model)

    def _fault(self) -> str:
        """What the core has against these choices on this machine."""
        try:
            profile = self.wizard.choices.request().profile
        except CompressorError as error:
            return str(error)
        machine = self.wizard.machine
        fit = fits(profile, machine) if machine else Fit(True, "")
        return "" if fit.ok else f"{profile.name} {fit.reason}: choose a profile that fits"


def machine_lines(machine: Machine) -> str:
    """This machine in four lines."""
    gpus = "; ".join(f"{g.name}, {g.memory_bytes / GIB:.0f} GiB" for g in machine.gpus) or "none with CUDA"
    return "\n".join(
        (
            f"CPU     {machine.cpu_name}, {machine.usable_cores} cores",
            f"        {', '.join(machine.isa) or 'no special instructions'}",
            f"Memory  {words.size(machine.memory_bytes)}, {words.size(machine.memory_available_bytes)} free; "
            f"disk {words.size(machine.disk_free_bytes)} free",
            f"GPU     {gpus}",
        )
    )


def profile_line(profile: Profile, fit: Fit) -> Content:
    """A profile in one line: what it is for, or why it does not fit."""
    if fit.ok:
        return Content.assemble((f"✓ {profile.name:<16}", "bold"), profile.summary)
    return Content.assemble((f"✗ {profile.name:<16}{fit.reason}", "dim"))
