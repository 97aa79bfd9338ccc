"""Writes the package of a finalist and proves it before it is called done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor import models
from compressor.engines.onnx_verify import check_logits
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.manifest import Accuracy, BudgetVerdict, Speed
from compressor.pipeline.accuracy import AccuracyTask
from compressor.pipeline.context import Context
from compressor.pipeline.plan import Plan
from compressor.pipeline.replanning import GIB, budget_limits
from compressor.pipeline.winner import Finalist
from compressor.space import SubNetwork
from compressor.supernet.elastic import Elastic

PROOF_TOKENS = 128


def package(
    context: Context,
    plan: Plan,
    engine: OnnxRuntimeEngine,
    task: AccuracyTask,
    finalist: Finalist,
    folder: Path,
) -> float:
    """Write the finalist to ``folder``, replacing a package of this run; the mean divergence in nats.

    Raises ``PackageError`` unless the engine's logits agree with the sub-network's in PyTorch.
    """
    profile = context.request.profile
    divergence = _prove(context, engine, finalist.subnet)
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    engine.write(
        finalist.subnet, scratch, manifest_fields(context, plan, task, finalist), numerics=profile.numerics
    )
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return divergence


def manifest_fields(context: Context, plan: Plan, task: AccuracyTask, finalist: Finalist) -> dict[str, Any]:
    """What the manifest says beyond what the engine knows."""
    profile = context.request.profile
    scored = finalist.report_score.metrics
    return {
        "name": f"{Path(plan.source.name).name}-{profile.name}",
        "base_model": plan.source.name,
        "base_revision": plan.source.revision,
        "license": plan.source.license,
        "profile": profile.name,
        "accuracy": [
            Accuracy(
                task=task.name,
                value=scored["accuracy"],
                low=scored["accuracy_low"],
                high=scored["accuracy_high"],
                items=int(scored["accuracy_items"]),
            )
        ],
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


def _prove(context: Context, engine: OnnxRuntimeEngine, subnet: SubNetwork) -> float:
    """Compare the engine's logits with PyTorch's on text of the unpruned model."""
    from compressor.evaluation.agreement import AgreementText

    ids = AgreementText.load(context.folder.text).ids[0, :PROOF_TOKENS].astype(np.int64)
    loaded = models.load(models.resolve(str(context.folder.supernet)), torch.float32)
    with Elastic(loaded.model).activated(subnet) as model, torch.inference_mode():
        expected = model(torch.from_numpy(ids[None])).logits[0].numpy()
    numerics = context.request.profile.numerics
    candidate = engine.build(subnet, numerics)
    return check_logits(expected, engine.logits(candidate, ids), numerics, subnet)
