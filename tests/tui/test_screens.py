"""Every screen in its main states, as a picture, at 80x24 and 120x40.

`pytest tests/tui/test_screens.py --snapshot-update` approves what is shown: look at the pictures first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from compressor.errors import InfeasibleError
from tests.tui.conftest import RecordedProbe
from tests.tui.driving import settle
from tests.tui.sample_run import write_run
from tui.app import ANSI_DARK, LIGHT, Wizard
from tui.endpoint import Endpoint, Reply
from tui.screens.serve import ServeStep
from tui.widgets.field import Field

SMALL, LARGE = (80, 24), (120, 40)
BEFORE_A_RUN = {
    "1-device": [],
    "2-model": ["ctrl+n"],
    "3-plan": ["ctrl+n", "ctrl+n"],
}
FURTHER_BEFORE_A_RUN = {
    "1-device-unfit": ["down", "down", "down"],
    "1-device-help": ["f1"],
    "1-device-commands": ["ctrl+p"],
    "2-model-tasks": ["ctrl+n", "tab", "down", "down", "enter"],
}
OF_A_RUN: dict[str, tuple[int, list[str]]] = {
    "4-run-stopped": (22, []),
    "5-choose": (40, []),
    "6-package": (40, ["ctrl+n"]),
}
FURTHER_OF_A_RUN: dict[str, tuple[int, list[str]]] = {
    "4-run-speed": (22, ["v"]),
    "5-choose-layers": (40, ["2"]),
    "5-choose-compare": (40, ["down", "3"]),
    "5-choose-compare-winner": (40, ["3"]),
    "5-choose-what-if": (40, ["4"]),
    "6-package-gguf": (40, ["ctrl+n", "shift+tab", "shift+tab", "right", "enter"]),
}
Build = Callable[..., Wizard]
Compare = Callable[..., bool]


def named(*groups: dict[str, Any]) -> list[Any]:
    """The states as parameters: those of the first group in both sizes, further ones in the small one."""
    main, *further = groups
    states = [(name, value, size) for name, value in main.items() for size in (SMALL, LARGE)]
    states += [(name, value, SMALL) for group in further for name, value in group.items()]
    return [pytest.param(value, size, id=f"{name}-{size[0]}x{size[1]}") for name, value, size in states]


def pressing(*keys: str) -> Callable[[Pilot[None]], Awaitable[None]]:
    """Press keys, each once the one before has done its work; cursors stand still for the picture."""

    async def act(pilot: Pilot[None]) -> None:
        await settle(pilot)
        for key in keys:
            await pilot.press(key)
            await settle(pilot)
        for box in pilot.app.screen.query(Input):
            box.cursor_blink = False

    return act


@pytest.mark.parametrize(("keys", "size"), named(BEFORE_A_RUN, FURTHER_BEFORE_A_RUN))
def test_before_a_run(keys: list[str], size: tuple[int, int], wizard: Build, snap_compare: Compare) -> None:
    assert snap_compare(wizard(), terminal_size=size, run_before=pressing(*keys))


@pytest.mark.parametrize(("state", "size"), named(OF_A_RUN, FURTHER_OF_A_RUN))
def test_of_a_run(
    state: tuple[int, list[str]], size: tuple[int, int], wizard: Build, snap_compare: Compare
) -> None:
    evaluations, keys = state
    folder = write_run(Path("runs/sample"), evaluations)
    assert snap_compare(wizard(folder.path), terminal_size=size, run_before=pressing(*keys))


@pytest.mark.parametrize("theme", [LIGHT, ANSI_DARK])
def test_in_light_and_in_16_colours(theme: str, wizard: Build, snap_compare: Compare) -> None:
    folder = write_run(Path("runs/sample"))
    assert snap_compare(wizard(folder.path, theme=theme), terminal_size=SMALL, run_before=pressing())


def test_a_plan_that_cannot_be(wizard: Build, snap_compare: Compare) -> None:
    probe = RecordedProbe(InfeasibleError("no sub-network meets the memory budget of 0.01 GiB: raise it"))
    assert snap_compare(wizard(probe=probe), terminal_size=SMALL, run_before=pressing("ctrl+n", "ctrl+n"))


def test_a_run_that_failed(wizard: Build, snap_compare: Compare) -> None:
    folder = write_run(Path("runs/sample"), 5)
    folder.log.write_text("Searching sub-networks ...\nerror: the disk is full: free some and run again\n")
    assert snap_compare(wizard(folder.path), terminal_size=SMALL, run_before=pressing())


async def go_to_serve(pilot: Pilot[None], app: Wizard, package: Path) -> ServeStep:
    """The last step with a package, and a key that is always the same."""
    await settle(pilot)
    app.package = package
    app.go("serve")
    await settle(pilot)
    screen = app.screen
    assert isinstance(screen, ServeStep)
    screen.query_one("#field-key", Field).show("sample-key")
    screen.refresh_facts()
    return screen


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "120x40"])
def test_before_the_endpoint_is_started(size: tuple[int, int], wizard: Build, snap_compare: Compare) -> None:
    folder = write_run(Path("runs/sample"))
    app = wizard(folder.path)

    async def serve(pilot: Pilot[None]) -> None:
        await go_to_serve(pilot, app, folder.package)
        await pressing()(pilot)

    assert snap_compare(app, terminal_size=size, run_before=serve)


class RecordedEndpoint(Endpoint):
    """An endpoint at work whose answer and figures are always the same."""

    alive = True  # type: ignore[assignment]
    memory_bytes = 276 * 2**20  # type: ignore[assignment]

    def chat(
        self, model: str, messages: list[dict[str, str]], stopped: Callable[[], bool]
    ) -> Iterator[Reply]:
        del model, messages, stopped
        for tokens, text in enumerate(("The capital ", "of France ", "is Paris."), start=1):
            yield Reply(text, 120.0, tokens, 133.0)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "120x40"])
def test_an_answer_of_the_endpoint(size: tuple[int, int], wizard: Build, snap_compare: Compare) -> None:
    folder = write_run(Path("runs/sample"))
    app = wizard(folder.path)

    async def ask(pilot: Pilot[None]) -> None:
        screen = await go_to_serve(pilot, app, folder.package)
        screen.endpoint = app.endpoint = RecordedEndpoint(folder.package, 8000, "sample-key")
        screen.model_name = "sample"
        screen._started(screen.endpoint, "")
        await pilot.press(*"Where is Paris?", "enter")
        for _ in range(100):
            await settle(pilot)
            if len(screen.messages) == 2:
                break
        await pressing()(pilot)

    assert snap_compare(app, terminal_size=size, run_before=ask)


def test_a_terminal_that_is_too_small(wizard: Build, snap_compare: Compare) -> None:
    assert snap_compare(wizard(), terminal_size=(60, 20), run_before=pressing())
