"""Every screen in its main states, as characters, at 80x24 and 120x40."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets._footer import FooterKey

from compressor.errors import InfeasibleError
from tests.tui.conftest import RecordedProbe
from tests.tui.sample_run import write_run
from tui.app import Wizard
from tui.screens.serve import ServeStep
from tui.screens.step import Step
from tui.widgets.field import Field

SIZES = [(80, 24), (120, 40)]
SMALL_ONLY = {
    "1-device-unfit",
    "1-device-help",
    "2-model-tasks",
    "4-run-speed",
    "5-choose-layers",
    "5-choose-compare",
    "5-choose-what-if",
}
"""Further states of a screen whose main state is looked at in both sizes."""
Build = Callable[..., Wizard]
Approve = Callable[[Wizard, str], None]


def sized(states: list[tuple[Any, ...]]) -> list[Any]:
    """The states, each in its sizes, as parameters of a test."""
    return [
        pytest.param(*state, size, id=name_of(state[0], size))
        for state in states
        for size in (SIZES[:1] if state[0] in SMALL_ONLY else SIZES)
    ]


def name_of(state: str, size: tuple[int, int]) -> str:
    return f"{state}-{size[0]}x{size[1]}"


def show(app: Wizard, keys: list[str], size: tuple[int, int], approve: Callable[[Wizard], None]) -> None:
    """Press the keys, let everything settle, and look."""

    async def drive() -> None:
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            for key in keys:
                await pilot.press(key)
                await settle(pilot)
            approve(app)

    asyncio.run(drive())


async def settle(pilot: Pilot[None]) -> None:
    """Wait for what was asked for, and for the footer, which is drawn last."""
    await pilot.app.workers.wait_for_complete()
    await pilot.pause()
    for _ in range(100):
        if not isinstance(pilot.app.screen, Step) or len(pilot.app.screen.query(FooterKey)):
            break
        await pilot.pause(0.05)
    await pilot.pause()


@pytest.mark.parametrize(
    ("state", "keys", "size"),
    sized(
        [
            ("1-device", []),
            ("1-device-unfit", ["down", "down", "down"]),
            ("1-device-help", ["f1"]),
            ("2-model", ["ctrl+n"]),
            ("2-model-tasks", ["ctrl+n", "tab", "down", "down", "enter"]),
            ("3-plan", ["ctrl+n", "ctrl+n"]),
        ]
    ),
)
def test_the_steps_before_a_run(
    state: str, keys: list[str], size: tuple[int, int], wizard: Build, approved: Approve
) -> None:
    show(wizard(), keys, size, lambda app: approved(app, name_of(state, size)))


@pytest.mark.parametrize(
    ("state", "evaluations", "keys", "size"),
    sized(
        [
            ("4-run-stopped", 22, []),
            ("4-run-speed", 22, ["v"]),
            ("5-choose-chart", 40, []),
            ("5-choose-layers", 40, ["2"]),
            ("5-choose-compare", 40, ["down", "3"]),
            ("5-choose-what-if", 40, ["4"]),
            ("6-package", 40, ["ctrl+n"]),
        ]
    ),
)
def test_the_steps_of_an_opened_run(
    state: str,
    evaluations: int,
    keys: list[str],
    size: tuple[int, int],
    wizard: Build,
    approved: Approve,
) -> None:
    write_run(Path("runs/sample"), evaluations)
    show(wizard(Path("runs/sample")), keys, size, lambda app: approved(app, name_of(state, size)))


@pytest.mark.parametrize("size", SIZES[:1], ids=str)
def test_a_plan_that_cannot_be(size: tuple[int, int], wizard: Build, approved: Approve) -> None:
    probe = RecordedProbe(InfeasibleError("no sub-network meets the memory budget of 0.01 GiB: raise it"))
    app = wizard(probe=probe)
    show(app, ["ctrl+n", "ctrl+n"], size, lambda app: approved(app, name_of("3-plan-infeasible", size)))


@pytest.mark.parametrize("size", SIZES[:1], ids=str)
def test_a_run_that_failed(size: tuple[int, int], wizard: Build, approved: Approve) -> None:
    folder = write_run(Path("runs/sample"), 5)
    folder.log.write_text("Searching sub-networks ...\nerror: the disk is full: free some and run again\n")
    app = wizard(Path("runs/sample"))
    show(app, [], size, lambda app: approved(app, name_of("4-run-failed", size)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_before_the_endpoint_is_started(size: tuple[int, int], wizard: Build, approved: Approve) -> None:
    folder = write_run(Path("runs/sample"))
    app = wizard(folder.path)
    shutil.rmtree(folder.package, ignore_errors=True)

    def look(app: Wizard) -> None:
        approved(app, name_of("7-serve", size))

    async def drive() -> None:
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            app.package = folder.package
            app.go("serve")
            await settle(pilot)
            assert isinstance(app.screen, ServeStep)
            app.screen.query_one("#field-key", Field).show("sample-key")
            await settle(pilot)
            look(app)

    asyncio.run(drive())


def test_a_terminal_that_is_too_small_is_told_so(wizard: Build, approved: Approve) -> None:
    show(wizard(), [], (60, 20), lambda app: approved(app, "too-small-60x20"))
