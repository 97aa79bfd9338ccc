"""From everything evaluated to the one that ships: picked by rule, measured again, scored on unseen items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from compressor.engines.onnx_exact import Exactness
from compressor.errors import UnfitMachineError
from compressor.ledger import Key, Row
from compressor.manifest import read_manifest
from compressor.measurement import Measurement
from compressor.pipeline.accuracy import AccuracyTask
from compressor.pipeline.candidates import Terms, paired_ties
from compressor.pipeline.context import Context
from compressor.pipeline.replanning import budget_limits
from compressor.pipeline.targets import Target
from compressor.runfolder import RunFolder
from compressor.search.front import Choice, choose_winner
from compressor.search.problem import Outcome
from compressor.space import SubNetwork

FINAL_MEASURE = "measure:final"
FINAL_SECONDS_FACTOR = 4.0
"""A winner is measured this many times longer than a candidate of the search."""
BESIDE = "beside_unpruned_int8"
"""Among a finalist's conditions: its times over the unpruned model's, as ``Ratio.to_dict`` gives them."""


@dataclass(frozen=True)
class Finalist:
    """A sub-network measured again and scored, as it ships, on items the search never saw."""

    outcome: Outcome
    speed: Measurement
    report_score: Row
    search_score: Row
    within_budgets: bool
    exactness: Exactness | None
    as_found: Row | None = None
    """Its report score before a tuning of its own, if it had one."""

    @property
    def subnet(self) -> SubNetwork:
        return self.outcome.subnet

    @property
    def divergence_nats(self) -> float | None:
        """How far its predictions are from its sub-network's; None where that was not compared."""
        return self.exactness.divergence_nats if self.exactness else None


class Workbench(Protocol):
    """What outcomes of the same weights are evaluated with."""

    @property
    def terms(self) -> Terms: ...
    @property
    def target(self) -> Target: ...
    @property
    def task(self) -> AccuracyTask: ...


def decide(
    context: Context, bench_of: Callable[[Outcome], Workbench], outcomes: Sequence[Outcome]
) -> tuple[Finalist, Choice]:
    """The winner by rule. One whose figures break a budget when measured again gives way to the next.

    Memory is computed until then: by how much its measured peak is over that, the others' are taken to be.
    If nothing meets the budgets the nearest is returned, marked as such.
    """
    current = list(outcomes)
    while True:
        tied = paired_ties(context.ledger, lambda outcome: bench_of(outcome).terms)
        choice = choose_winner(current, budget_limits(context.request.profile), tied)
        finalist = finish(context, bench_of(choice.nearest), choice.nearest)
        if choice.winner is None or finalist.within_budgets:
            return finalist, choice
        context.warn(f"{finalist.subnet.digest} breaks a budget when measured again: taking the next best")
        same = finalist.subnet, finalist.outcome.free
        current = [finalist.outcome if (o.subnet, o.free) == same else o for o in current]
        current = _with_measured_memory(current, bench_of(choice.nearest).terms, finalist)


def _with_measured_memory(outcomes: Sequence[Outcome], terms: Terms, finalist: Finalist) -> list[Outcome]:
    """Outcomes with memory at least as far over the computed figure as the finalist's measured peak is."""
    over = finalist.outcome.values["memory_bytes"] / terms.memory_bytes(finalist.subnet)

    def raised(outcome: Outcome) -> Outcome:
        memory = max(outcome.values["memory_bytes"], over * terms.memory_bytes(outcome.subnet))
        return replace(outcome, values={**outcome.values, "memory_bytes": memory})

    return [raised(outcome) for outcome in outcomes]


def finish(context: Context, bench: Workbench, outcome: Outcome, like: Finalist | None = None) -> Finalist:
    """The sub-network measured again, longer and in a process of its own, and scored as it ships.

    It is proved first, for what makes it exact enough may cost speed. ``like`` is the same sub-network with
    other weights: where it computes just so, its figures are this one's.
    """
    limits = budget_limits(context.request.profile)
    terms, target, task = bench.terms, bench.target, bench.task
    exactness = target.prove(terms, outcome.subnet)
    if like is not None and _fine(like.exactness) == _fine(exactness):
        speed = like.speed
    else:
        speed = _measured_again(context, terms, target, outcome.subnet, exactness)
    memory = {"memory_bytes": float(speed.peak_memory_bytes)}
    again = replace(outcome, values={**outcome.values, **speed.metrics(), **memory})
    within = all(again.values[name] <= limit for name, limit in limits.items())
    scores = {
        split: _scored(context, terms, target, task, again.subnet, exactness, split) for split in task.splits
    }
    return Finalist(again, speed, scores["report"], scores["search"], within, exactness)


def _measured_again(
    context: Context, terms: Terms, target: Target, subnet: SubNetwork, exactness: Exactness | None
) -> Measurement:
    key = replace(terms.speed_key(subnet), task=FINAL_MEASURE, numerics=_shipped(terms, exactness))
    row = context.ledger.get(key)
    if row is None:
        seconds = FINAL_SECONDS_FACTOR * context.request.effort.bench_seconds
        speed = target.bench_longer(subnet, exactness, seconds)
        details = {**speed.conditions, **_beside_unpruned(context, target, subnet, exactness, seconds)}
        row = context.ledger.put(Row(key, subnet, speed.metrics(), details=details))
    return Measurement.from_metrics(row.metrics, row.details)


def _beside_unpruned(
    context: Context, target: Target, subnet: SubNetwork, exactness: Exactness | None, seconds: float
) -> dict[str, object]:
    """What a finalist's conditions say of its times beside the unpruned model's."""
    try:
        ratios = target.beside_unpruned(subnet, exactness, seconds)
    except UnfitMachineError as error:
        context.warn(f"the winner is not measured in turns with the unpruned model: {error}")
        return {}
    return {BESIDE: dict(ratios)} if ratios else {}


def _scored(
    context: Context,
    terms: Terms,
    target: Target,
    task: AccuracyTask,
    subnet: SubNetwork,
    exactness: Exactness | None,
    split: str,
) -> Row:
    numerics, kept = _shipped(terms, exactness), terms.workload.cache_key
    key = Key(subnet.digest, terms.weights, task.key(split), numerics, engine=terms.engine, workload=kept)
    row = context.ledger.get(key)
    if row is None:
        with target.artefact(subnet, exactness) as artefact:
            score = task.score_artefact(artefact, split)
        row = context.ledger.put(Row(key, subnet, score.metrics(), items=score.items))
    return row


def _shipped(terms: Terms, exactness: Exactness | None) -> str:
    """Numerics in the ledger of what ships, set apart from those of candidates where they differ."""
    return f"{terms.numerics}+fine" if _fine(exactness) else terms.numerics


def _fine(exactness: Exactness | None) -> tuple[str, ...]:
    return exactness.fine_inputs if exactness else ()


def winner_of(folder: RunFolder) -> SubNetwork:
    """The sub-network that the run packaged. Raises ``PackageError`` where there is none."""
    return SubNetwork.from_dict(read_manifest(folder.package).architecture.model_dump())
