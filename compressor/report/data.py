"""What a report is made from: plain values, filled in by whoever ran the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from compressor.space import SubNetwork

AGREEMENT = "agreement"


@dataclass(frozen=True)
class Score:
    """A score between 0 and 1 with its 95% interval, where one is known, on so many items."""

    value: float
    low: float | None = None
    high: float | None = None
    items: int = 0


@dataclass(frozen=True)
class Speed:
    """Figures at the profile's workload: times in ms, output tokens/s over all requests."""

    ttft_ms: float
    tpot_ms: float
    throughput_tok_s: float


@dataclass(frozen=True)
class Candidate:
    """An evaluated sub-network. ``accuracy`` is on the search split; None where it failed.

    ``infeasible`` means evaluated but over a budget. ``on_front`` is the run's own front, over all its
    objectives. ``free``: the unpruned model with its own weights.
    """

    subnet: SubNetwork
    weight_bytes: int
    accuracy: Score | None = None
    speed: Speed | None = None
    status: Literal["ok", "failed", "infeasible"] = "ok"
    on_front: bool = False
    free: bool = False


@dataclass(frozen=True)
class Reference:
    """The unpruned model as a user would otherwise pick it: ``numerics`` is bf16, int8, int4, ...

    ``accuracy`` is on the report split, like the winner's; ``search_accuracy`` on the search split,
    like the candidates'. ``name`` says which model and engine. ``within_budgets``: it could be served
    instead of the winner; None where an older run did not tell.
    """

    name: str
    numerics: str
    weight_bytes: int
    accuracy: Score | None = None
    search_accuracy: Score | None = None
    speed: Speed | None = None
    within_budgets: bool | None = None


@dataclass(frozen=True)
class PairedTest:
    """McNemar's test of the winner against a reference on the same items of the report split.

    ``gained`` items only the winner has right, ``lost`` only the reference.
    """

    against: str
    p_value: float
    gained: int
    lost: int


@dataclass(frozen=True)
class SideBySide:
    """The winner's time over that of the unpruned model in INT8, both measured in turns: what disturbs one
    disturbs both. ``half_interval`` is of the 95% interval, relative to the ratio."""

    ratio: float
    half_interval: float


@dataclass(frozen=True)
class Winner:
    """The packaged sub-network. ``accuracy`` is the artefact's own, on the report split; ``as_found``
    the same before a fine-tuning of its own, if it had one."""

    subnet: SubNetwork
    weight_bytes: int
    accuracy: Score
    speed: Speed
    search_accuracy: Score | None = None
    parameters: int | None = None
    tests: tuple[PairedTest, ...] = ()
    ttft_beside: SideBySide | None = None
    tpot_beside: SideBySide | None = None
    as_found: Score | None = None
    free: bool = False
    """Whether it is the unpruned model with its own weights: nothing found was better."""


@dataclass(frozen=True)
class Budget:
    """One budget of the profile and the winner's figure for it, in the unit its name ends in."""

    name: Literal["memory_gib", "ttft_ms", "tpot_ms"]
    limit: float
    measured: float | None = None
    met: bool = False


@dataclass(frozen=True)
class Workload:
    """Tokens of each request and how many run at once."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int = 1


@dataclass(frozen=True)
class Compared:
    """One way to reach the size: its score when tuned and, where it has one, before; its times over the
    unpruned model's; what its tuning took; and how the sub-network fares against it."""

    name: str
    parameters: int
    score: Score
    untuned: Score | None = None
    ttft: SideBySide | None = None
    tpot: SideBySide | None = None
    tuned_minutes: float = 0.0
    test: PairedTest | None = None


@dataclass(frozen=True)
class Comparison:
    """The unpruned model, the sub-network and its rivals, in this order, scored on the same unseen items.

    ``numerics`` are what all were computed in.
    """

    model: str
    task: str
    numerics: str
    compared: tuple[Compared, ...]


@dataclass(frozen=True)
class ReportData:
    """A run, as its report shows it.

    ``num_layers`` and ``intermediate_size`` are the super-network's. ``weight_budget_bytes`` is what the
    memory budget leaves to weights after key-value cache and activations, where that is one figure.
    ``loss_curves`` map a name (``super``, ``sub``) to (step, loss in nats a token). ``next_commands`` are
    (what for, command). ``notes`` are sentences a reader must not miss, the nearest miss where nothing
    meets the budgets. ``comparisons`` are with other pruning methods, made after the run.
    """

    model: str
    profile: str
    device: str
    engine: str
    numerics: str
    task: str
    workload: Workload
    num_layers: int
    intermediate_size: int
    candidates: tuple[Candidate, ...] = ()
    references: tuple[Reference, ...] = ()
    winner: Winner | None = None
    budgets: tuple[Budget, ...] = ()
    weight_budget_bytes: int | None = None
    loss_curves: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    conditions: Mapping[str, str] = field(default_factory=dict)
    next_commands: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def reference(self, numerics: str) -> Reference | None:
        """The unpruned model in these numerics, if it was measured."""
        return next((r for r in self.references if r.numerics == numerics), None)

    @property
    def strongest_rival(self) -> Reference | None:
        """The most accurate form of the unpruned model that anybody has for free within the budgets."""
        able = [r for r in self.references if r.within_budgets and r.accuracy is not None]
        return max(
            able, key=lambda r: (r.accuracy.value if r.accuracy else 0.0, -r.weight_bytes), default=None
        )

    def budget(self, name: str) -> Budget | None:
        return next((b for b in self.budgets if b.name == name), None)

    @property
    def accuracy_label(self) -> str:
        """What the scores are, as an axis or a column names it."""
        return "agreement with the unpruned model" if self.task == AGREEMENT else f"{self.task} accuracy"

    @property
    def accuracy_name(self) -> str:
        """The same in one word or so, for narrow columns."""
        return "agreement" if self.task == AGREEMENT else self.task
