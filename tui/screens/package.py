"""Step 6, package: writes what serves, or a file for another runtime, and verifies it as one watches."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Button, RadioSet

from compressor.errors import CompressorError, PackageError
from compressor.manifest import read_manifest
from tui import words
from tui.manifest import holds, manifest_lines
from tui.results import Pick
from tui.screens.model import press, radio
from tui.screens.step import Step
from tui.widgets.field import Field
from tui.widgets.line import Line

PACKAGE = "package"
FORMATS = ((PACKAGE, "Package"), ("gguf", "GGUF"), ("hf", "Hugging Face"), ("vllm", "vLLM"))
NOTES = {
    "gguf": "For llama.cpp and what builds on it, Q8_0. Not what was measured: another runtime.",
    "hf": "A folder for transformers in bf16, to look at, tune on or convert. Not what was measured.",
    "vllm": "Compressed-tensors W8A8 for vLLM with this program's plugin. Not what was measured.",
}
SUFFIXES = {"gguf": ".gguf", "hf": "-hf", "vllm": "-vllm"}


class PackageStep(Step):
    """Write the chosen sub-network; go on once its package is verified."""

    step = "package"
    next_label = "Serve"
    BINDINGS: ClassVar[list[BindingType]] = [("ctrl+s", "write", "Write"), ("ctrl+y", "copy", "Copy line")]

    def __init__(self) -> None:
        super().__init__()
        self.pick: Pick | None = None
        self.format = PACKAGE
        self.busy = False
        self.proofs: list[str] = []

    def content(self) -> ComposeResult:
        with Vertical(id="package-top"):
            yield Line("", id="what", markup=False)
            yield from radio("format", FORMATS)
            yield Line("", id="note", markup=False)
            with Horizontal(classes="pair"):
                yield Field("Write to", "out")
                yield Button("Write and verify", id="write", variant="success", compact=True)
        with VerticalScroll(id="written"):
            yield Line("", id="proofs")
            yield Line("", id="manifest", markup=False)
        with Vertical(id="line-box"):
            yield Line("", id="line", markup=False)

    def refresh_facts(self) -> None:
        pick, run = self.wizard.pick, self.wizard.choices.run
        if pick is None or run is None:
            self.say("Nothing is chosen yet: choose a sub-network in the step before.", "warning")
            return
        if pick == self.pick:
            return
        self.pick = pick
        self.wizard.package = None
        self.query_one("#what", Line).update(what_line(pick))
        press(self, "format", PACKAGE)
        self._choose_format(PACKAGE)
        self._clear()
        self.say("")
        self.query_one("#write").focus()

    def obstacle(self) -> str:
        if self.busy:
            return "it is being written and verified: wait a moment"
        return "" if self.wizard.package else "write and verify the package first (Ctrl+S)"

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "write":
            event.stop()
            self.action_write()
        else:
            super().on_button_pressed(event)

    def on_radio_set_changed(self, event: RadioSet.Changed) -> None:
        self._choose_format(str(event.pressed.id).removeprefix("format-"))

    def on_field_changed(self) -> None:
        if self.format == PACKAGE:
            self.wizard.package = None
        self._show_line()

    def action_write(self) -> None:
        out = self.query_one("#field-out", Field).value
        if self.busy or self.pick is None:
            return
        if out is None:
            self.say("Write to: name the file or folder to write", "error")
            return
        self.busy = True
        self._clear()
        self.say("Writing and verifying …")
        self._write(Path(str(out)).expanduser(), self.pick)

    def action_copy(self) -> None:
        if self.pick is not None:
            self.wizard.copy_to_clipboard(shlex.join(["compress", *self._arguments()]))
            self.notify("The command line is copied.", timeout=3)

    @work(exclusive=True, group="write")
    async def _write(self, out: Path, pick: Pick) -> None:
        served, arguments = self.format == PACKAGE, self._arguments()
        try:
            if served and holds(out, pick):
                self._tell(f"{out} holds this sub-network already")
            else:
                await self._command(*arguments)
            if not served:
                self.say("Written. The next step serves the package: write that one as well.")
                return
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

    def _arguments(self) -> list[str]:
        """The verb of the command line that writes what is chosen, and its flags."""
        assert self.pick is not None
        verb = ["package"] if self.format == PACKAGE else ["export"]
        form = [] if self.format == PACKAGE else ["--format", self.format]
        out = self.query_one("#field-out", Field).value
        to = [] if out is None else ["--out", str(Path(str(out)).expanduser())]
        return [*verb, str(self.wizard.choices.run), *form, "--pick", self.pick.digest, *to]

    def _choose_format(self, name: str) -> None:
        """Show where the format goes and what it is for."""
        if self.pick is None:
            return
        self.format = name
        chosen, run = self.pick.chosen, self.wizard.choices.run
        assert run is not None
        base = "package" if chosen else f"package-{self.pick.digest}"
        other = f"model{SUFFIXES.get(name, '')}" if chosen else f"{self.pick.digest}{SUFFIXES.get(name, '')}"
        self.query_one("#field-out", Field).show(str(run / (base if name == PACKAGE else other)))
        profile = self.wizard.choices.request().profile
        measured = (
            f"What serves here: engine {profile.engine}, {profile.numerics.upper()}, as it was measured."
        )
        self.query_one("#note", Line).update(NOTES.get(name, measured))
        self._show_line()

    def _show_line(self) -> None:
        if self.pick is not None:
            self.query_one("#line", Line).update(shlex.join(["compress", *self._arguments()]))

    def _clear(self) -> None:
        self.proofs = []
        self.query_one("#proofs", Line).update("")
        self.query_one("#manifest", Line).update("")

    def _tell(self, line: str) -> None:
        self.proofs.append(line)
        done = (Content.from_markup("[$text-success]✓[/] $line", line=line) for line in self.proofs)
        self.query_one("#proofs", Line).update(Content("\n").join(done))


def what_line(pick: Pick) -> str:
    score = pick.candidate.accuracy
    return (
        f"{'The run’s own choice' if pick.chosen else 'Your choice'}: "
        f"{words.percent(score.value if score else None)} at {words.size(pick.candidate.weight_bytes)}, "
        f"{pick.candidate.subnet.depth} layers"
    )
