"""What a run tells the world. The command line and the terminal UI listen to the same events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base of all events. ``to_dict`` gives what crosses a process boundary."""

    def to_dict(self) -> dict[str, Any]:
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage of the pipeline begins; ``total`` steps (0: not known yet), counted in ``unit``."""

    stage: str
    title: str
    total: int = 0
    unit: str = "steps"


@dataclass(frozen=True)
class StageProgress(Event):
    """``done`` of ``total`` steps of a stage. Later events replace earlier ones."""

    stage: str
    done: int
    total: int
    detail: str = ""


@dataclass(frozen=True)
class StageFinished(Event):
    stage: str
    seconds: float
    skipped: bool = False


@dataclass(frozen=True)
class LossReported(Event):
    """A training step: ``network`` is ``super`` or ``sub``; loss in nats a token."""

    step: int
    network: str
    loss: float


@dataclass(frozen=True)
class CandidateEvaluated(Event):
    """A sub-network was evaluated and measured (or failed); ``values`` by objective name."""

    index: int
    subnet: dict[str, list[int]]
    values: dict[str, float]
    on_front: bool
    failed: bool = False
    reused: bool = False


@dataclass(frozen=True)
class Message(Event):
    """A line for the log; ``level`` is ``info`` or ``warning``."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class RunFinished(Event):
    """The run's verdict, as the command line prints it and the report repeats it."""

    folder: str
    verdict: dict[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that does nothing."""


EVENT_TYPES = {
    cls.__name__: cls
    for cls in (
        StageStarted,
        StageProgress,
        StageFinished,
        LossReported,
        CandidateEvaluated,
        Message,
        RunFinished,
    )
}


def event_from_dict(data: dict[str, Any]) -> Event:
    """The event that ``Event.to_dict`` wrote."""
    fields = dict(data)
    return EVENT_TYPES[fields.pop("event")](**fields)
