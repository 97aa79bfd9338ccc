"""Writes the package of a finalist, with what its manifest says."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.manifest import Accuracy, BudgetVerdict, Speed
from compressor.pipeline.accuracy import AccuracyTask
from compressor.pipeline.context import Context
from compressor.pipeline.plan import Plan
from compressor.pipeline.replanning import GIB, budget_limits
from compressor.pipeline.targets import Target
from compressor.pipeline.winner import Finalist


def package(
    context: Context,
    plan: Plan,
    target: Target,
    task: AccuracyTask,
    finalist: Finalist,
    folder: Path,
) -> None:
    """Write the finalist, which is proved already, to ``folder``, replacing a package of this run."""
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    fields = manifest_fields(context, plan, task, finalist)
    target.write(finalist.subnet, scratch, fields, finalist.exactness)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def manifest_fields(context: Context, plan: Plan, task: AccuracyTask, finalist: Finalist) -> dict[str, Any]:
    """What the manifest says beyond what the engine knows."""
    profile = context.request.profile
    return {
        "name": f"{Path(plan.source.name).name}-{profile.name}",
        "base_model": plan.source.name,
        "base_revision": plan.source.revision,
        "license": plan.source.license,
        "profile": profile.name,
        "divergence_nats": finalist.divergence_nats,
        "rounding_nats": finalist.exactness.rounding_nats if finalist.exactness else None,
        "accuracy": [accuracy_entry(task, finalist.report_score.metrics)],
        "speed": [
            Speed(
                workload=profile.workload.label,
                device=context.device_label,
                engine=profile.engine,
                ttft_ms=finalist.speed.ttft_ms,
                tpot_ms=finalist.speed.tpot_ms,
                throughput_tok_s=finalist.speed.throughput_tok_s,
                peak_memory_bytes=finalist.speed.peak_memory_bytes,
                conditions=dict(finalist.speed.conditions),
            )
        ],
        "budgets": budget_verdicts(context, finalist),
    }


def accuracy_entry(task: AccuracyTask, metrics: Mapping[str, float]) -> Accuracy:
    """A score on the report split, as the manifest says it."""
    return Accuracy(
        task=task.name,
        value=metrics["accuracy"],
        low=metrics["accuracy_low"],
        high=metrics["accuracy_high"],
        items=int(metrics["accuracy_items"]),
    )


def budget_verdicts(context: Context, finalist: Finalist) -> list[BudgetVerdict]:
    limits, figures = budget_limits(context.request.profile), finalist.outcome.values
    return [
        BudgetVerdict(
            name=shown,  # type: ignore[arg-type]
            limit=limits[name] / scale,
            measured=figures[name] / scale,
            met=figures[name] <= limits[name],
        )
        for name, shown, scale in (
            ("memory_bytes", "memory_gib", GIB),
            ("ttft_ms", "ttft_ms", 1),
            ("tpot_ms", "tpot_ms", 1),
        )
    ]
