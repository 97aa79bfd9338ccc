"""The super-network's fine-tuning as a run asks for it: on what, by which recipe, from which teacher."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from compressor.engines.rounding import Rounding
from compressor.events import Event, Listener, StageProgress
from compressor.models import LoadedModel
from compressor.pipeline.base import compute_device, compute_dtype, load_to_compute
from compressor.pipeline.context import Context, Result
from compressor.pipeline.plan import Plan, learns_rounded
from compressor.pipeline.rounding import (
    learnt_rounding,
    served,
    served_rounded,
    start_rounded,
)
from compressor.runfolder import Weights, replace_folder
from compressor.space import SubNetwork
from compressor.supernet.config import SUPER_EVERY_WITH_LABELS
from compressor.supernet.data import Examples, load_training_data
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, discard_checkpoint, finetune
from compressor.supernet.folder import load_supernet, read_info, save_supernet
from compressor.supernet.importance import Importance, rank, sort_neurons
from compressor.supernet.targets import Targets, compute

NEURON_SEQUENCES = 32
LAYER_SEQUENCES = 8
"""Sequences that neurons and layers are ranked on."""

CURVES = ("super", "sub", "held-out")
"""What ``finetune`` calls its losses."""
WINNER = "winner "
"""Before a curve's name: of the winner's own tuning."""

ADAPTER_LR = 1e-3
"""Adapters take higher rates than all weights do (Biderman et al., arXiv 2405.09673)."""

HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 32
"""Rows of the user's training data that tuning doesn't learn, and ends by."""


def tune_supernet(context: Context, plan: Plan) -> Result:
    """Rank, sort and tune the unpruned model, and write the super-network's folder."""
    loaded = load_to_compute(context)
    text = training_text(context)
    context.say("ranking neurons and layers on text of the unpruned model")
    importance = _rank(loaded, text, plan)
    sort_neurons(loaded.model, importance)
    space = replace(plan.space, drop_order=importance.drop_order)
    examples = training_examples(context, loaded.tokenizer, context.request.keeps_teacher)
    known = context.request.data_free and context.request.keeps_teacher
    result = finetune(
        Elastic(loaded.model),
        space,
        examples,
        tuning_config(context, examples),
        context.listener,
        context.ledger.record_curve,
        context.folder.checkpoints,
        Targets.load(training_targets(context)) if known else None,
        served_rounded(context, plan, loaded.model)
        if learns_rounded(context.request, plan.space)
        else served(context, plan),
    )
    context.ledger.end_curves(CURVES, result.steps)
    if result.stopped_early:
        context.say(f"tuning ended at step {result.steps}: the loss on held-out rows falls no more")

    def save(path: Path) -> None:
        path.mkdir(parents=True)
        loaded.model.to("cpu", torch.bfloat16)
        save_supernet(loaded.model, loaded.tokenizer, importance.drop_order, importance.ordering, path)

    replace_folder(context.folder.supernet, save)
    discard_checkpoint(context.folder.checkpoints)
    shutil.rmtree(context.folder.tuned, ignore_errors=True)  # of the super-network before this one
    if not context.request.effort.winner_minutes:
        training_targets(context).unlink(missing_ok=True)
    return {"weights": read_info(context.folder.supernet).weights_hash, **asdict(result)}


def tune_alone(context: Context, plan: Plan, subnet: SubNetwork, minutes: float, weights: Weights) -> Result:
    """Tune one sub-network of ``weights`` alone, where no other's steps pull at them, and write the result as
    ``tuned_alone`` names it. Matrices of few bits learn rounded as they will ship, their scales with them."""
    model, tokenizer, info = load_supernet(weights.supernet, compute_dtype(context))
    model.to(compute_device())
    rounding = Rounding.load(weights.supernet)
    rounded = learns_rounded(context.request, plan.space)
    elastic = Elastic(model)
    told = served(context, plan)
    if rounded:
        told = served_rounded(context, plan, model, rounding)
        start_rounded(model, rounding, subnet)
        told.learn_scales(elastic.activate(subnet), subnet)
        elastic.reset()
    space = replace(plan.space, drop_order=info.drop_order)
    examples = training_examples(context, tokenizer, context.request.tuning_loss != "cross-entropy")
    config = replace(tuning_config(context, examples), minutes=minutes, only=subnet, teacher="original")
    checkpoints = context.folder.checkpoints / subnet.digest
    stage = tuned_stage(subnet)
    result = finetune(
        elastic,
        space,
        examples,
        config,
        partial(told_as, context.listener, stage),
        lambda curve, step, loss: context.ledger.record_curve(WINNER + curve, step, loss),
        checkpoints,
        _original(context, examples, config),
        told,
    )
    if rounded:
        rounding = learnt_rounding(model, subnet, rounding, told)
    context.ledger.end_curves([WINNER + curve for curve in CURVES], result.steps)

    def save(path: Path) -> None:
        path.mkdir(parents=True)
        model.to("cpu", torch.bfloat16)
        save_supernet(model, tokenizer, info.drop_order, info.ordering, path)
        if rounded:
            rounding.save(path)

    target = context.folder.tuned_alone(subnet.digest).supernet
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(target, save)
    shutil.rmtree(checkpoints, ignore_errors=True)
    training_targets(context).unlink(missing_ok=True)
    return {"weights": read_info(target).weights_hash, **asdict(result)}


def tuned_stage(subnet: SubNetwork) -> str:
    return f"tuned-{subnet.digest}"


def told_as(listener: Listener, stage: str, event: Event) -> None:
    """Pass on what a tuning tells, as another stage's progress."""
    listener(replace(event, stage=stage) if isinstance(event, StageProgress) else event)


def _original(context: Context, examples: Examples, config: FinetuneConfig) -> Targets | None:
    """What the unpruned model says of the examples: kept since it wrote them, or asked now."""
    if not config.distils:
        return None
    known = Targets.load(training_targets(context)) if context.request.data_free else None
    if known is not None:
        return known
    context.say("asking the unpruned model about the training text")
    return compute(load_to_compute(context).model, examples.ids, config.batch)


def tuning_config(context: Context, examples: Examples) -> FinetuneConfig:
    """The recipe: what the request tells, and what fits the data else."""
    request, effort = context.request, context.request.effort
    adapters = request.lora_rank > 0
    return FinetuneConfig(
        lora_rank=request.lora_rank,
        gradient_checkpointing=adapters,  # who asks for adapters is short of memory
        steps=effort.tuning_steps,
        minutes=effort.tuning_minutes,
        batch=effort.tuning_batch,
        budget=request.profile.budgets.memory_bytes,
        held_out=0 if request.data_free else min(MOST_HELD_OUT, int(HELD_OUT_SHARE * len(examples.ids))),
        seed=request.seed,
        **{
            "lr": ADAPTER_LR if adapters else FinetuneConfig.lr,
            "loss": request.tuning_loss,
            "super_every": FinetuneConfig.super_every if request.data_free else SUPER_EVERY_WITH_LABELS,
            "sampling": "budget",
            **request.tuning.told,
        },
    )


def tuning_inputs(context: Context) -> dict[str, Any]:
    """What of the request decides a tuning, beside weights, minutes and search space."""
    request, effort = context.request, context.request.effort
    return {
        "effort": [effort.tuning_steps, effort.tuning_batch],
        "train_data": request.train_data,
        "tuning": request.tuning.told,
        "lora_rank": request.lora_rank,
        "seed": request.seed,
    }


def training_examples(context: Context, tokenizer: PreTrainedTokenizerBase, keeps_teacher: bool) -> Examples:
    """What is learnt: text that the unpruned model wrote, or the user's rows; of these no more than a tuning
    learns where the unpruned model's view of each is kept."""
    request, effort = context.request, context.request.effort
    if request.data_free:
        return Examples.of_text(training_text(context))
    rows = load_training_data(request.train_data, tokenizer, effort.sequence_length, context.listener)
    if not keeps_teacher:
        return rows
    wanted = effort.tuning_steps * effort.tuning_batch + MOST_HELD_OUT
    return rows.some(wanted, request.seed)


def training_text(context: Context) -> torch.Tensor:
    """Token ids [sequences, length] that the unpruned model wrote to be ranked and tuned on."""
    with np.load(training_text_file(context)) as data:
        return torch.from_numpy(data["ids"].astype(np.int64))


def training_text_file(context: Context) -> Path:
    return context.folder.path / "training-text.npz"


def training_targets(context: Context) -> Path:
    """What the unpruned model thought while it wrote the training text; gone once that is tuned on."""
    return context.folder.path / "training-targets.pt"


def _rank(loaded: LoadedModel, text: torch.Tensor, plan: Plan) -> Importance:
    """Neurons by activation; layers greedily, which takes a pass a layer and so a little less text."""
    neurons = rank(loaded.model, batches(text[:NEURON_SEQUENCES]), layers="paper")
    drops = plan.shape.num_layers - plan.space.depths[0]
    layers = rank(
        loaded.model, batches(text[:LAYER_SEQUENCES]), neurons="paper", layers="greedy", drops=drops
    )
    ordering = f"{neurons.ordering.split('+')[0]}+{layers.ordering.split('+')[1]}"
    return Importance(neurons.neuron_orders, layers.drop_order, ordering)


def batches(text: torch.Tensor) -> list[torch.Tensor]:
    """Sequences to calibrate on, eight at a time."""
    return [text[i : i + 8] for i in range(0, len(text), 8)]
