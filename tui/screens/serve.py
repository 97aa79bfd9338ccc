"""Step 7, serve and try: starts the endpoint, shows how to reach it, and chats with the model."""

from __future__ import annotations

import secrets
import shlex
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Button, Input, Static
from textual.worker import get_current_worker

from compressor.errors import CompressorError
from compressor.manifest import read_manifest
from tui import words
from tui.endpoint import Endpoint, Reply, refuse_taken_port
from tui.screens.step import Step
from tui.widgets.field import Field
from tui.widgets.line import Line

DEFAULT_PORT = 8000
LOOK_EVERY_S = 1.0


class ServeStep(Step):
    """Talk to the package through its real endpoint."""

    step = "serve"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("ctrl+s", "serve", "Start/stop"),
        ("ctrl+y", "copy", "Copy curl line"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.endpoint: Endpoint | None = None
        self.ready = False
        self.model_name = ""
        self.messages: list[dict[str, str]] = []
        self.figures = ""

    def content(self) -> ComposeResult:
        with Vertical(id="serve-top"):
            with Horizontal(classes="pair"):
                yield Field("Port", "port", kind="integer")
                yield Field("Key", "key", placeholder="empty: no key")
                yield Button("Start", id="toggle", variant="success", compact=True)
            yield Line("", id="where", markup=False)
            yield Line("", id="curl", markup=False)
            yield Line("", id="shell", markup=False)
            yield Line("", id="live", markup=False)
        yield VerticalScroll(id="chat", can_focus=False)
        yield Input(placeholder="Say something to the model, then Enter", id="prompt", compact=True)

    def on_mount(self) -> None:
        self.query_one("#field-port", Field).show(DEFAULT_PORT)
        self.query_one("#field-key", Field).show(secrets.token_urlsafe(9))
        self.set_interval(LOOK_EVERY_S, self._look)

    def refresh_facts(self) -> None:
        package = self._package
        if package is None:
            self.say("There is no package yet: write one in the step before.", "warning")
            return
        if self.endpoint is None or not self.endpoint.alive:
            self.query_one("#where", Line).update(f"Package  {package}")
            self._show_line()
            self.query_one("#toggle").focus()
        self._show_live()

    def action_serve(self) -> None:
        if self.endpoint is not None and self.endpoint.alive:
            self.stop_endpoint()
            self.say("The endpoint has ended.")
        else:
            self._start()
        self._show_live()

    def action_copy(self) -> None:
        if self.endpoint is not None:
            self.wizard.copy_to_clipboard(self.endpoint.curl_line(self.model_name))
            self.notify("The curl line is copied.", timeout=3)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "toggle":
            event.stop()
            self.action_serve()
        else:
            super().on_button_pressed(event)

    def on_field_changed(self, event: Field.Changed) -> None:
        self.say(event.error, "error")
        self._show_line()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        text = event.value.strip()
        if event.input.id != "prompt" or not text:
            return
        if not self.ready or self.endpoint is None:
            self.say("Start the endpoint first (Ctrl+S).", "warning")
            return
        event.input.value = ""
        self.messages.append({"role": "user", "content": text})
        self.query_one("#chat").mount(Static(text, classes="said-user", markup=False))
        answer = Static("…", classes="said-model", markup=False)
        self.query_one("#chat").mount(answer)
        answer.scroll_visible(animate=False)
        self._answer(answer)

    def stop_endpoint(self) -> None:
        """End the endpoint, if there is one."""
        self.workers.cancel_group(self, "answer")
        self.ready = False
        if self.endpoint is not None:
            self.endpoint.stop()

    @property
    def _package(self) -> Path | None:
        return self.wizard.package

    def _asked(self) -> tuple[object, str]:
        """Port and key as they stand in the fields."""
        port, key = (self.query_one(f"#field-{name}", Field).value for name in ("port", "key"))
        return port, str(key or "")

    def _show_line(self) -> None:
        """The command line that starts the same endpoint without the wizard."""
        port, key = self._asked()
        if self._package is not None and isinstance(port, int):
            line = shlex.join(["compress", *Endpoint(self._package, port, key).serve_arguments()])
            self.query_one("#shell", Line).update(line)

    def _start(self) -> None:
        port, key = self._asked()
        package = self._package
        if package is None or not isinstance(port, int):
            self.say("give a port" if package else "there is no package yet", "error")
            return
        self.stop_endpoint()
        self.endpoint = self.wizard.endpoint = Endpoint(package, port, key)
        try:
            refuse_taken_port(port)
            self.model_name = read_manifest(package).name
            self.endpoint.start()
        except CompressorError as error:
            self.say(str(error), "error")
            return
        self.say("Starting the endpoint …")
        self._wait_ready(self.endpoint)

    @work(thread=True, exclusive=True, group="ready")
    def _wait_ready(self, endpoint: Endpoint) -> None:
        fault = ""
        try:
            endpoint.wait_ready()
        except CompressorError as error:
            fault = str(error)
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._started, endpoint, fault)

    def _started(self, endpoint: Endpoint, fault: str) -> None:
        if endpoint is not self.endpoint:
            return
        self.ready = not fault
        self.say(fault, "error")
        if self.ready:
            self.query_one("#where", Line).update(
                f"URL  {endpoint.url}    model  {self.model_name}    key  {endpoint.key or 'none'}"
            )
            self.query_one("#curl", Line).update(endpoint.curl_line(self.model_name))
            self.query_one("#prompt").focus()
        self._show_live()

    @work(thread=True, exclusive=True, group="answer")
    def _answer(self, shown: Static) -> None:
        """Stream the answer into the chat."""
        worker, endpoint = get_current_worker(), self.endpoint
        assert endpoint is not None
        text = ""
        try:
            for reply in endpoint.chat(self.model_name, list(self.messages), lambda: worker.is_cancelled):
                text += reply.text
                self.app.call_from_thread(self._show_reply, shown, text, reply)
        except CompressorError as error:
            if not worker.is_cancelled:
                self.app.call_from_thread(self.say, str(error), "error")
        if not worker.is_cancelled:
            self.app.call_from_thread(self._keep_answer, shown, text)

    def _show_reply(self, shown: Static, text: str, reply: Reply) -> None:
        shown.update(text)
        shown.scroll_visible(animate=False)
        self.figures = f"first token {words.milliseconds(reply.ttft_ms)}, {reply.tokens} tokens"
        if reply.tok_s:
            self.figures += f", {words.rate(reply.tok_s)}"
        self._show_live()

    def _keep_answer(self, shown: Static, text: str) -> None:
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()
            shown.update("(no answer)")

    def _look(self) -> None:
        if self.is_current:
            self._show_live()

    def _show_live(self) -> None:
        alive = self.endpoint is not None and self.endpoint.alive
        button = self.query_one("#toggle", Button)
        button.label = "Stop" if alive else "Start"
        button.variant = "error" if alive else "success"
        if self.ready and not alive and self.endpoint is not None:
            self.ready = False
            self.say(f"The endpoint has ended: {self.endpoint.last_words()}", "error")
        memory = self.endpoint.memory_bytes if alive and self.endpoint is not None else None
        state = "ready" if self.ready else ("starting" if alive else "not running")
        parts = [f"Endpoint {state}", f"memory {words.size(memory)}" if memory else "", self.figures]
        self.query_one("#live", Line).update("    ".join(part for part in parts if part))
