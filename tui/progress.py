"""A run as its events tell it so far: stages, sub-networks, log. Folds events into plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compressor.events import (
    CandidateEvaluated,
    Event,
    LossReported,
    Message,
    RunFinished,
    StageFinished,
    StageProgress,
    StageStarted,
)
from compressor.space import SubNetwork


@dataclass
class Stage:
    """One stage's state. Times are seconds since 1970."""

    title: str
    unit: str
    total: int
    began: float
    done: int = 0
    now: float = 0.0
    detail: str = ""
    seconds: float | None = None
    skipped: bool = False

    @property
    def finished(self) -> bool:
        return self.seconds is not None

    @property
    def share(self) -> float | None:
        """Share that is done, 0 to 1; None while the total is not known."""
        if self.finished:
            return 1.0
        return min(1.0, self.done / self.total) if self.total else None

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds to the stage's end, from its pace so far."""
        if self.finished or not self.total or not self.done or self.now <= self.began:
            return None
        return (self.total - self.done) * (self.now - self.began) / self.done


@dataclass(frozen=True)
class Point:
    """A sub-network that was evaluated. Values that were not measured are None."""

    index: int
    subnet: SubNetwork
    accuracy: float | None
    weight_bytes: float | None
    throughput_tok_s: float | None
    on_front: bool
    failed: bool
    unpruned: bool = False


@dataclass
class RunProgress:
    """Everything that the run screen shows."""

    num_layers: int = 0
    intermediate_size: int = 0
    stages: dict[str, Stage] = field(default_factory=dict)
    points: dict[str, Point] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    losses: dict[str, tuple[int, float]] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None

    @property
    def best(self) -> Point | None:
        """The most accurate pruned sub-network so far; of the budgets' front where there is one."""
        able = [p for p in self.points.values() if not p.failed and not p.unpruned and p.accuracy is not None]
        front = [p for p in able if p.on_front]
        return max(front or able, key=lambda p: p.accuracy or 0.0, default=None)

    @property
    def current(self) -> Stage | None:
        """The stage at work."""
        return next((s for s in reversed(self.stages.values()) if not s.finished), None)

    def see(self, time: float, event: Event) -> None:
        """Take in one event that happened at ``time``."""
        match event:
            case StageStarted():
                self.stages.pop(event.stage, None)
                self.stages[event.stage] = Stage(event.title, event.unit, event.total, time, now=time)
                self.verdict = None
            case StageProgress() if event.stage in self.stages:
                stage = self.stages[event.stage]
                stage.done, stage.total, stage.detail, stage.now = event.done, event.total, event.detail, time
            case StageFinished() if event.stage in self.stages:
                stage = self.stages[event.stage]
                stage.seconds, stage.skipped, stage.now = event.seconds, event.skipped, time
            case LossReported():
                self.losses[event.network] = (event.step, event.loss)
            case CandidateEvaluated():
                self._place(event)
            case Message():
                self.log.append((event.level, event.text))
            case RunFinished():
                self.verdict = event.verdict

    def _place(self, event: CandidateEvaluated) -> None:
        subnet = SubNetwork.from_dict(event.subnet)
        value = event.values.get
        self.points[subnet.digest] = Point(
            index=event.index,
            subnet=subnet,
            accuracy=value("accuracy"),
            weight_bytes=value("weight_bytes"),
            throughput_tok_s=value("throughput_tok_s"),
            on_front=event.on_front,
            failed=event.failed,
            unpruned=self._is_unpruned(subnet),
        )

    def _is_unpruned(self, subnet: SubNetwork) -> bool:
        return subnet.depth == self.num_layers and set(subnet.widths) == {self.intermediate_size}
