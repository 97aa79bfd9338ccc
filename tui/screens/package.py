"""Step 6, package: writes the folder that serves, verifies it as one watches, shows its manifest."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import ClassVar

from rich.markup import escape
from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Button, RichLog

from compressor.errors import CompressorError, PackageError
from compressor.manifest import Manifest, read_manifest
from tui import words
from tui.results import Pick
from tui.screens.step import Step
from tui.widgets.field import Field
from tui.widgets.line import Line

BUDGET_WORDS = {
    "memory_gib": ("memory", "GiB"),
    "ttft_ms": ("first token", "ms"),
    "tpot_ms": ("each token", "ms"),
}


class PackageStep(Step):
    """Write the chosen sub-network to a folder; go on once it is verified."""

    step = "package"
    next_label = "Serve"
    BINDINGS: ClassVar[list[BindingType]] = [("ctrl+s", "write", "Write and verify")]

    def __init__(self) -> None:
        super().__init__()
        self.pick: Pick | None = None
        self.busy = False

    def content(self) -> ComposeResult:
        with Vertical(id="package-top"):
            yield Line("", id="what", markup=False)
            yield Field("Folder", "out")
            yield Button("Write and verify", id="write", variant="success", compact=True)
        yield RichLog(id="proofs", wrap=True, markup=True)
        with VerticalScroll(id="manifest-box", can_focus=False):
            yield Line("", id="manifest", markup=False)

    def on_mount(self) -> None:
        self.query_one("#proofs").can_focus = False

    def refresh_facts(self) -> None:
        pick, run = self.wizard.pick, self.wizard.choices.run
        if pick is None or run is None:
            self.say("Nothing is chosen yet: choose a sub-network in the step before.", "warning")
            return
        if pick == self.pick:
            return
        self.pick = pick
        self.wizard.package = None
        self.query_one("#what", Line).update(self._what(pick))
        name = "package" if pick.chosen else f"package-{pick.digest}"
        self.query_one("#field-out", Field).show(str(run / name))
        self.query_one("#proofs", RichLog).clear()
        self.query_one("#manifest", Line).update("")
        self.say("")
        self.query_one("#write").focus()

    def obstacle(self) -> str:
        if self.busy:
            return "the package is being written and verified: wait a moment"
        return "" if self.wizard.package else "write and verify the package first (Ctrl+S)"

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "write":
            event.stop()
            self.action_write()
        else:
            super().on_button_pressed(event)

    def on_field_changed(self) -> None:
        self.wizard.package = None

    def action_write(self) -> None:
        out = self.query_one("#field-out", Field).value
        if self.busy or self.pick is None:
            return
        if out is None:
            self.say("Folder: name the folder to write", "error")
            return
        self.busy = True
        self.query_one("#proofs", RichLog).clear()
        self.say("Writing and verifying …")
        self._write(Path(str(out)).expanduser(), self.pick)

    @work(exclusive=True, group="write")
    async def _write(self, out: Path, pick: Pick) -> None:
        try:
            if holds(out, pick):
                self._tell(f"{out} holds this sub-network already")
            else:
                run = str(self.wizard.choices.run)
                await self._command("package", run, "--pick", pick.digest, "--out", str(out))
            await self._command("verify", str(out))
            manifest = read_manifest(out)
        except CompressorError as error:
            self.say(str(error), "error")
            return
        finally:
            self.busy = False
        self.wizard.package = out
        self.query_one("#manifest", Line).update(manifest_lines(manifest))
        self.say("The package is whole. Go on with Ctrl+N.")

    async def _command(self, *arguments: str) -> None:
        """Run a verb of the command line and show its lines. Raises ``PackageError`` with its complaint."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "compressor.cli", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdout is not None
        last = ""
        try:
            async for raw in process.stdout:
                last = raw.decode(errors="replace").strip()
                if last and not last.startswith("error: "):
                    self._tell(last)
        except asyncio.CancelledError:
            process.terminate()
            await process.wait()
            raise
        if await process.wait():
            raise PackageError(last.removeprefix("error: ") or f"compress {arguments[0]} failed")

    def _tell(self, line: str) -> None:
        self.query_one("#proofs", RichLog).write(f"[green]✓[/] {escape(line)}")

    def _what(self, pick: Pick) -> str:
        profile = self.wizard.choices.request().profile
        score = pick.candidate.accuracy
        return (
            f"{'The run’s own choice' if pick.chosen else 'Your choice'}: "
            f"{words.percent(score.value if score else None)} at {words.size(pick.candidate.weight_bytes)}, "
            f"{pick.candidate.subnet.depth} layers\n"
            f"Engine {profile.engine}, format {profile.numerics.upper()}: as it was measured"
        )


def holds(folder: Path, pick: Pick) -> bool:
    """Whether the folder is a package of just this sub-network."""
    try:
        return read_manifest(folder).architecture.model_dump() == pick.candidate.subnet.to_dict()
    except CompressorError:
        return False


def manifest_lines(manifest: Manifest) -> str:
    """The manifest for people."""
    lines = [
        f"Name       {manifest.name}",
        f"Base       {manifest.base_model} {manifest.base_revision}".rstrip(),
        f"Licence    {manifest.license or 'not named'}",
        f"Model      {words.count(manifest.parameters)} parameters, "
        f"{len(manifest.architecture.layers)} layers, {manifest.numerics}, "
        f"context {manifest.context_length:,}",
        f"Weights    {words.size(manifest.weight_bytes)} in {len(manifest.files)} files",
    ]
    lines += [
        f"Accuracy   {words.percent(a.value)} {a.task} "
        f"({words.interval(a.low, a.high)}, {a.items:,} unseen items)"
        for a in manifest.accuracy
    ]
    lines += [
        f"Speed      first token {words.milliseconds(s.ttft_ms)}, each {words.milliseconds(s.tpot_ms)}, "
        f"{words.rate(s.throughput_tok_s)} on {s.device}"
        for s in manifest.speed
    ]
    for budget in manifest.budgets:
        name, unit = BUDGET_WORDS[budget.name]
        lines.append(
            f"Budget     {'✓' if budget.met else '✗'} {name}: {words.significant(budget.measured)} "
            f"of {words.significant(budget.limit)} {unit}"
        )
    return "\n".join(lines)
