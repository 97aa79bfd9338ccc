"""Drives a wizard as a person would: by keys, each once the one before has done its work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from textual.pilot import Pilot
from textual.widgets import Input, Static

from tui.app import Wizard
from tui.screens.step import Step

Build = Callable[..., Wizard]
Drive = Callable[[Pilot[None], Wizard], Awaitable[None]]


def drive(app: Wizard, steps: Drive, size: tuple[int, int] = (80, 24)) -> None:
    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            await steps(pilot, app)

    asyncio.run(run())


async def press(pilot: Pilot[None], *keys: str) -> None:
    """Press one key after the other, each once the one before has done its work."""
    for key in keys:
        await pilot.press(key)
        await settle(pilot)


async def fill(pilot: Pilot[None], field: str, text: str) -> None:
    """Go to a field and type over what stands there."""
    box = pilot.app.screen.query_one(f"#input-{field}", Input)
    box.focus()
    await pilot.pause()
    box.value = ""
    await pilot.press(*text)
    await settle(pilot)


def message(app: Wizard) -> str:
    return str(app.screen.query_one("#message", Static).content)


def step(app: Wizard) -> str:
    assert isinstance(app.screen, Step)
    return app.screen.step


async def settle(pilot: Pilot[None]) -> None:
    """Wait for what was asked for, and for what the screen makes of it."""
    await pilot.app.workers.wait_for_complete()
    await pilot.pause()
    await pilot.pause()
