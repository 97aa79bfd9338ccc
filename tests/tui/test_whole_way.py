"""The whole way by keys alone, nothing recorded: first screen to chat answer, on a real tiny model."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from compressor.manifest import read_manifest
from tui.app import Wizard, make_app
from tui.screens.run import RunStep
from tui.screens.serve import ServeStep
from tui.screens.step import Step

PROFILE = """
name = "toy-cpu"
[device]
kind = "cpu"
memory_gib = 0.5
[budgets]
memory_gib = 0.25
ttft_ms = 60000
tpot_ms = 60000
[workload]
prompt_tokens = 16
output_tokens = 8
[space]
depth_fractions = [0.5, 0.75, 1.0]
width_fractions = [0.5, 0.75, 1.0]
"""


async def wait(pilot: Pilot[None], what: str, true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        await pilot.pause(0.2)
        if true():
            return
    shown = str(pilot.app.screen.query_one("#message", Static).content)
    pytest.fail(f"waited {seconds:.0f} s for {what}; the screen says: {shown or 'nothing'}")


async def go_on(pilot: Pilot[None], app: Wizard, step: str, seconds: float = 60) -> None:
    """Press next until the step is there: what is being looked up may hold one back for a while."""

    def there() -> bool:
        return isinstance(app.screen, Step) and app.screen.step == step

    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        await pilot.press("ctrl+n")
        await pilot.pause(0.5)
    assert there(), str(app.screen.query_one("#message", Static).content)


async def type_into(pilot: Pilot[None], field: str, text: str) -> None:
    """Tab to a field and type over what stands there."""
    for _ in range(30):
        focused = pilot.app.focused
        if focused is not None and focused.id == f"input-{field}":
            break
        await pilot.press("tab")
    box = pilot.app.screen.query_one(f"#input-{field}", Input)
    assert box.has_focus
    await pilot.press("end", "ctrl+u", *text)
    await pilot.pause()
    assert box.value == text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_from_the_first_screen_to_a_chat_answer(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(PROFILE)
    app = make_app()
    app.choices = app.choices.but(profile="toy.toml")

    async def drive() -> None:
        async with app.run_test(size=(80, 24)) as pilot:
            await wait(pilot, "the machine", lambda: app.machine is not None, 60)
            await go_on(pilot, app, "model")
            await pilot.press("down", "enter")
            await type_into(pilot, "model", str(tiny_model_folder))
            await go_on(pilot, app, "plan", 120)
            await type_into(pilot, "evaluations", "6")
            await type_into(pilot, "tuning_minutes", "0.05")
            await go_on(pilot, app, "run", 120)
            assert isinstance(app.screen, RunStep)
            await wait(pilot, "the run", lambda: app.has_result, 900)
            assert len(app.screen.progress.points) >= 6
            await go_on(pilot, app, "choose")
            await go_on(pilot, app, "package")
            await pilot.press("ctrl+s")
            await wait(pilot, "the package", lambda: app.package is not None, 300)
            await go_on(pilot, app, "serve")
            await type_into(pilot, "port", str(free_port()))
            await pilot.press("ctrl+s")
            screen = app.screen
            assert isinstance(screen, ServeStep)
            await wait(pilot, "the endpoint", lambda: screen.ready, 120)
            await pilot.press(*"Hello", "enter")
            await wait(pilot, "an answer", lambda: len(screen.messages) == 2, 120)
            assert screen.messages[1]["content"]

    asyncio.run(drive())
    assert app.package is not None
    assert read_manifest(app.package).profile == "toy-cpu"
    assert app.endpoint is not None and not app.endpoint.alive
