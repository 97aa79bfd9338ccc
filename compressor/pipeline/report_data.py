"""Fills in what the report shows from the ledger, the plan and the winner."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from compressor.engines.memory import required_memory_bytes, shipped_weight_bytes
from compressor.errors import RunConflictError
from compressor.ledger import Row
from compressor.measurement import Measurement
from compressor.pipeline.accuracy import AccuracyTask
from compressor.pipeline.context import Context
from compressor.pipeline.plan import Plan
from compressor.pipeline.references import EMBEDDINGS_IN_8, PYTORCH, Form, ReferenceSet
from compressor.pipeline.replanning import GIB, budget_limits
from compressor.pipeline.tuning import CURVES, WINNER
from compressor.pipeline.winner import BESIDE, Finalist
from compressor.report import data as report
from compressor.runfolder import RunFolder, write_json
from compressor.search.front import pareto_front
from compressor.search.problem import Outcome, Problem
from compressor.space import SubNetwork, parameter_count

REFERENCE_NAMES = {
    "bf16": "unpruned, bf16",
    "fp8": "unpruned, FP8",
    "int8": "unpruned, INT8",
    EMBEDDINGS_IN_8: "unpruned, INT4, embeddings INT8",
    "int4": "unpruned, INT4",
}
ALL_CURVES = (*CURVES, *(WINNER + curve for curve in CURVES))
_COMPARISON = TypeAdapter(report.Comparison)


def collect(
    context: Context,
    plan: Plan,
    problem: Problem,
    task: AccuracyTask,
    outcomes: Sequence[Outcome],
    references: ReferenceSet,
    finalist: Finalist | None,
    notes: Sequence[str] = (),
) -> report.ReportData:
    """Everything the report, the table and the wizard show of a run."""
    profile = context.request.profile
    workload = profile.workload
    return report.ReportData(
        model=plan.source.name,
        profile=profile.name,
        device=context.device_label,
        engine=profile.engine,
        numerics=profile.numerics,
        task=task.name,
        workload=report.Workload(workload.prompt_tokens, workload.output_tokens, workload.concurrency),
        num_layers=plan.shape.num_layers,
        intermediate_size=plan.shape.intermediate_size,
        candidates=_candidates(problem, outcomes),
        references=tuple(_references(context, plan, references)),
        winner=_winner(plan, problem, task, references, finalist) if finalist else None,
        budgets=_budgets(context, finalist),
        weight_budget_bytes=_weight_budget(context, outcomes, finalist),
        loss_curves={name: tuple(context.ledger.curve(name)) for name in ALL_CURVES},
        conditions=_conditions(finalist),
        next_commands=_next_commands(context, finalist),
        notes=tuple(notes),
        comparisons=known_comparisons(context.folder),
    )


def save_comparison(folder: RunFolder, subnet: SubNetwork, comparison: report.Comparison) -> None:
    """Keep what ``known_comparisons`` finds: one for each sub-network."""
    write_json(folder.comparisons / f"{subnet.digest}.json", _COMPARISON.dump_python(comparison, mode="json"))


def known_comparisons(folder: RunFolder) -> tuple[report.Comparison, ...]:
    """Comparisons made in this run, that of the largest sub-network first. Raises ``RunConflictError``."""
    found = []
    for path in sorted(folder.comparisons.glob("*.json")):
        try:
            found.append(_COMPARISON.validate_json(path.read_bytes()))
        except ValidationError:
            raise RunConflictError(f"{path} is damaged: delete it and compare again") from None
    return tuple(sorted(found, key=lambda c: -c.compared[1].parameters))


def _weight_budget(context: Context, outcomes: Sequence[Outcome], finalist: Finalist | None) -> int | None:
    """What the memory budget leaves for weights beside the winner's own cache and activations.

    None where layers' bits can be chosen: sub-networks of the same bytes then take unlike memory.
    """
    chosen = finalist.outcome if finalist else next(iter(outcomes), None)
    if chosen is None or len(context.request.profile.layer_bits) > 1:
        return None
    beside = chosen.values["memory_bytes"] - chosen.values["weight_bytes"]
    return max(0, int(context.request.profile.budgets.memory_bytes - beside))


def _candidates(problem: Problem, outcomes: Sequence[Outcome]) -> tuple[report.Candidate, ...]:
    front = {(o.subnet, o.free) for o in pareto_front(problem, outcomes)}
    return tuple(
        report.Candidate(
            subnet=o.subnet,
            weight_bytes=int(o.values["weight_bytes"]),
            accuracy=score_of(o.values) if "accuracy" in o.values else None,
            speed=_speed(Measurement.from_metrics(o.values)) if "ttft_ms" in o.values else None,
            status=o.status if o.status != "ok" or problem.meets_limits(o) else "infeasible",
            on_front=(o.subnet, o.free) in front,
            free=o.free,
        )
        for o in outcomes
    )


def _references(context: Context, plan: Plan, references: ReferenceSet) -> list[report.Reference]:
    found = []
    engine = context.request.profile.engine
    for form in references.forms:
        speed = context.ledger.get(references.speed_key(form))
        scores = {s: context.ledger.get(references.score_key(form, s)) for s in references.task.splits}
        if speed is None:
            continue
        found.append(
            report.Reference(
                name=_reference_name(references, form),
                numerics=form.name,
                weight_bytes=shipped_weight_bytes(plan.shape, form.subnet, form.numerics, engine),
                accuracy=_row_score(scores["report"]),
                search_accuracy=_row_score(scores["search"]),
                speed=_speed(Measurement.from_metrics(speed.metrics)),
                within_budgets=_within_budgets(context, plan, references, form, speed),
            )
        )
    return found


def _within_budgets(context: Context, plan: Plan, references: ReferenceSet, form: Form, speed: Row) -> bool:
    """Whether the profile's engine can serve a form within all of its budgets."""
    profile = context.request.profile
    if references.engine(form.numerics) != profile.engine:
        return False
    memory = required_memory_bytes(
        plan.shape, form.subnet, profile.workload, form.numerics, profile.engine
    ).total
    figures = {"memory_bytes": float(memory), **speed.metrics}
    return all(figures[name] <= limit for name, limit in budget_limits(profile).items())


def _reference_name(references: ReferenceSet, form: Form) -> str:
    elsewhere = " in PyTorch" if references.engine(form.numerics) == PYTORCH else ""
    return REFERENCE_NAMES[form.name] + elsewhere


def _winner(
    plan: Plan, problem: Problem, task: AccuracyTask, references: ReferenceSet, finalist: Finalist
) -> report.Winner:
    accuracy = _row_score(finalist.report_score)
    assert accuracy is not None
    return report.Winner(
        subnet=finalist.subnet,
        weight_bytes=int(problem.exact["weight_bytes"](finalist.subnet)),
        accuracy=accuracy,
        speed=_speed(finalist.speed),
        search_accuracy=_row_score(finalist.search_score),
        parameters=parameter_count(plan.shape, finalist.subnet),
        tests=_paired_tests(task, references, finalist),
        free=finalist.outcome.free,
        ttft_beside=_beside(finalist.speed, "ttft"),
        tpot_beside=_beside(finalist.speed, "tpot"),
        as_found=_row_score(finalist.as_found),
    )


def _beside(speed: Measurement, figure: str) -> report.SideBySide | None:
    ratios = speed.conditions.get(BESIDE)
    if not ratios:
        return None
    return report.SideBySide(ratios[f"{figure}_ratio"], ratios[f"{figure}_ratio_interval"] / 2)


def _paired_tests(
    task: AccuracyTask, references: ReferenceSet, finalist: Finalist
) -> tuple[report.PairedTest, ...]:
    """The winner against the unpruned model in each quantized form, on the same unseen items."""
    ours, found = finalist.report_score, []
    for form in references.forms:
        rival = references.context.ledger.get(references.score_key(form, "report"))
        same = finalist.outcome.free and rival is not None and form.subnet == finalist.subnet
        if form.numerics == "bf16" or same or rival is None or rival.items is None or ours.items is None:
            continue
        test = task.paired(ours.items, rival.items)
        against = REFERENCE_NAMES[form.name].replace("unpruned,", "the unpruned model in")
        found.append(report.PairedTest(against, test.p_value, test.gained, test.lost))
    return tuple(found)


def _budgets(context: Context, finalist: Finalist | None) -> tuple[report.Budget, ...]:
    limits = budget_limits(context.request.profile)
    figures = finalist.outcome.values if finalist else {}
    rows = []
    for name, shown, scale in (
        ("memory_bytes", "memory_gib", GIB),
        ("ttft_ms", "ttft_ms", 1),
        ("tpot_ms", "tpot_ms", 1),
    ):
        measured = figures.get(name)
        met = measured is not None and measured <= limits[name]
        rows.append(
            report.Budget(
                shown,  # type: ignore[arg-type]
                limits[name] / scale,
                None if measured is None else measured / scale,
                met,
            )
        )
    return tuple(rows)


def _conditions(finalist: Finalist | None) -> dict[str, str]:
    conditions = finalist.speed.conditions if finalist else {}
    return {name: str(value) for name, value in conditions.items() if name != BESIDE}


def _next_commands(context: Context, finalist: Finalist | None) -> tuple[tuple[str, str], ...]:
    run = shlex.quote(str(context.folder.path))
    report_line = ("read the report", f"compress report {run}")
    if finalist is None:
        return (report_line,)
    package = shlex.quote(str(context.folder.package))
    return (
        ("serve it", f"compress serve {package}"),
        ("ask it something", f'compress ask {package} "What is the capital of France?"'),
        report_line,
    )


def score_of(values: object) -> report.Score:
    """A report's score from a ledger row's metrics."""
    metrics: dict[str, float] = dict(values)  # type: ignore[call-overload]
    return report.Score(
        metrics["accuracy"],
        metrics.get("accuracy_low"),
        metrics.get("accuracy_high"),
        int(metrics.get("accuracy_items", 0)),
    )


def _row_score(row: Row | None) -> report.Score | None:
    return None if row is None or "accuracy" not in row.metrics else score_of(row.metrics)


def _speed(measured: Measurement) -> report.Speed:
    return report.Speed(measured.ttft_ms, measured.tpot_ms, measured.throughput_tok_s)
