"""Which class shows which step; each is imported when it is first built."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from tui.screens.step import Step

PLACES = {
    "device": "DeviceStep",
    "model": "ModelStep",
    "plan": "PlanStep",
    "run": "RunStep",
    "choose": "ChooseStep",
    "package": "PackageStep",
    "serve": "ServeStep",
}


def step_factory(name: str) -> Callable[[], Step]:
    """A function that imports and builds the screen of a step."""

    def build() -> Step:
        screen: Step = getattr(import_module(f"tui.screens.{name}"), PLACES[name])()
        return screen

    return build
