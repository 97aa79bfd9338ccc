"""From a base model to a tuned super-network and the exports that candidates are slices of."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from compressor import models
from compressor.compute import fastest_cpu_dtype
from compressor.engines.memory import served_memory
from compressor.engines.onnx_export import export
from compressor.engines.rounding import rounded
from compressor.evaluation.agreement import AgreementText, torch_predict
from compressor.events import StageProgress
from compressor.models import LoadedModel
from compressor.pipeline.accuracy import mixed_rows
from compressor.pipeline.context import Context, Result, run_stage
from compressor.pipeline.plan import Plan, learns_rounded
from compressor.runfolder import replace_folder
from compressor.space import SearchSpace
from compressor.supernet.config import SUPER_EVERY_WITH_LABELS
from compressor.supernet.data import Examples, load_training_data
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, discard_checkpoint, finetune
from compressor.supernet.folder import SupernetInfo, read_info, save_supernet, weights_hash
from compressor.supernet.importance import Importance, rank, sort_neurons
from compressor.supernet.sampling import sample_text
from compressor.supernet.served import Served
from compressor.supernet.targets import Targets

NEURON_SEQUENCES = 32
LAYER_SEQUENCES = 8
"""Sequences that neurons and layers are ranked on."""
BASE_BITS = (4, 8)
ADAPTER_LR = 1e-3
"""Adapters take higher rates than all weights do (Biderman et al., arXiv 2405.09673)."""

HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 32
"""Rows of the user's training data that tuning doesn't learn, and ends by."""


def prepare(context: Context, plan: Plan) -> tuple[SupernetInfo, SearchSpace]:
    """Do, or find done, everything before the search; the super-network and its search space."""
    base = _base_stage(context, plan)
    text = _text_stage(context, base)
    effort = context.request.effort
    inputs = {
        "text": text,
        "space": context.request.profile.space.model_dump(exclude={"bits"}),
        "effort": [effort.tuning_steps, effort.tuning_minutes, effort.tuning_batch],
        "train_data": context.request.train_data,
        "seed": context.request.seed,
    }
    if learns_rounded(context.request, plan.space):
        inputs["bits"] = list(plan.space.bits)
    if context.request.lora_rank:  # absent otherwise, so that a run from before it stays done
        inputs["lora_rank"] = context.request.lora_rank
    if context.request.tuning.told:
        inputs["tuning"] = context.request.tuning.told
    run_stage(
        context,
        "supernet",
        "Tuning the super-network",
        inputs,
        lambda: _tune(context, plan),
        context.request.effort.tuning_steps,
    )
    info = read_info(context.folder.supernet)
    space = replace(plan.space, drop_order=info.drop_order)
    if context.request.profile.engine == "onnxruntime":
        _export_stage(context, info, space)
    return info, space


def load_base(context: Context, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """The unpruned model from the run's own copy."""
    return models.load(models.resolve(str(context.folder.base)), dtype)


def load_to_compute(context: Context) -> LoadedModel:
    """The unpruned model where and in what this run computes."""
    loaded = load_base(context, compute_dtype(context))
    loaded.model.to(compute_device())
    return loaded


def compute_device() -> torch.device:
    """Where text is written, the super-network tuned and sub-networks scored: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(context: Context) -> torch.dtype:
    """What this run writes text, tunes and scores in: decided once, so that a resumed run does the same."""
    dtype: torch.dtype = getattr(torch, str(context.folder.result("base").get("compute", "bfloat16")))
    return dtype


def _base_stage(context: Context, plan: Plan) -> Result:
    def fill(path: Path) -> None:
        models.to_folder(plan.source, path)

    def work() -> Result:
        replace_folder(context.folder.base, fill)
        dtype = torch.bfloat16 if compute_device().type == "cuda" else fastest_cpu_dtype()
        compute = str(dtype).removeprefix("torch.")
        return {"weights": weights_hash(context.folder.base), "compute": compute}

    return run_stage(context, "base", "Loading the model", asdict(plan.source), work)


def _text_stage(context: Context, base: Result) -> Result:
    """Text that the unpruned model writes: to calibrate and tune on, and other text to score on."""
    effort = context.request.effort
    inputs = {
        "base": base,
        "sequences": [effort.text_sequences, effort.score_sequences, effort.sequence_length],
        "seed": context.request.seed,
    }
    total = (effort.text_sequences + effort.score_sequences) * effort.sequence_length

    def progress(done: int, total: int) -> None:
        context.listener(StageProgress("text", done, total))

    def work() -> Result:
        loaded = load_to_compute(context)
        sequences = effort.text_sequences + effort.score_sequences
        sampled = sample_text(
            loaded.model,
            loaded.tokenizer,
            sequences,
            effort.sequence_length,
            context.request.seed,
            progress,
        )
        ids = sampled.ids.numpy()
        scored = ids[effort.text_sequences :][mixed_rows(effort.score_sequences)]
        text = AgreementText.build(scored, torch_predict(loaded.model), context.request.seed)
        text.save(context.folder.text)
        np.savez_compressed(_training_text(context), ids=ids[: effort.text_sequences].astype(np.int32))
        if context.request.data_free:
            sampled.targets.first(effort.text_sequences).save(_training_targets(context))
        return {"digest": text.digest}

    return run_stage(context, "text", "Writing text with the unpruned model", inputs, work, total, "tokens")


def _tune(context: Context, plan: Plan) -> Result:
    effort, seed = context.request.effort, context.request.seed
    loaded = load_to_compute(context)
    with np.load(_training_text(context)) as data:
        text = torch.from_numpy(data["ids"].astype(np.int64))
    context.say("ranking neurons and layers on text of the unpruned model")
    importance = _rank(loaded, text, plan)
    sort_neurons(loaded.model, importance)
    space = replace(plan.space, drop_order=importance.drop_order)
    data_free = context.request.data_free
    examples = Examples.of_text(text) if data_free else _examples(context, loaded)
    rank = context.request.lora_rank
    config = FinetuneConfig(
        lora_rank=rank,
        gradient_checkpointing=rank > 0,  # who asks for adapters is short of memory
        steps=effort.tuning_steps,
        minutes=effort.tuning_minutes,
        batch=effort.tuning_batch,
        budget=context.request.profile.budgets.memory_bytes,
        held_out=0 if data_free else min(MOST_HELD_OUT, int(HELD_OUT_SHARE * len(examples.ids))),
        seed=seed,
        **{
            "lr": ADAPTER_LR if rank else FinetuneConfig.lr,
            "loss": context.request.tuning_loss,
            "super_every": FinetuneConfig.super_every if data_free else SUPER_EVERY_WITH_LABELS,
            "sampling": "budget",
            **context.request.tuning.told,
        },
    )
    result = finetune(
        Elastic(loaded.model),
        space,
        examples,
        config,
        context.listener,
        context.ledger.record_curve,
        context.folder.checkpoints,
        Targets.load(_training_targets(context)) if data_free and context.request.keeps_teacher else None,
        Served(
            lambda subnet: float(served_memory(plan.shape, subnet, context.request.profile).total),
            rounded if learns_rounded(context.request, space) else None,
        ),
    )
    context.ledger.end_curves(result.steps)
    if result.stopped_early:
        context.say(f"tuning ended at step {result.steps}: the loss on held-out rows falls no more")

    def save(path: Path) -> None:
        path.mkdir(parents=True)
        loaded.model.to("cpu", torch.bfloat16)
        save_supernet(loaded.model, loaded.tokenizer, importance.drop_order, importance.ordering, path)

    replace_folder(context.folder.supernet, save)
    discard_checkpoint(context.folder.checkpoints)
    _training_targets(context).unlink(missing_ok=True)
    return {"weights": read_info(context.folder.supernet).weights_hash, **asdict(result)}


def _rank(loaded: LoadedModel, text: torch.Tensor, plan: Plan) -> Importance:
    """Neurons by activation; layers greedily, which takes a pass a layer and so a little less text."""
    neurons = rank(loaded.model, _batches(text[:NEURON_SEQUENCES]), layers="paper")
    drops = plan.shape.num_layers - plan.space.depths[0]
    layers = rank(
        loaded.model, _batches(text[:LAYER_SEQUENCES]), neurons="paper", layers="greedy", drops=drops
    )
    ordering = f"{neurons.ordering.split('+')[0]}+{layers.ordering.split('+')[1]}"
    return Importance(neurons.neuron_orders, layers.drop_order, ordering)


def _batches(text: torch.Tensor) -> list[torch.Tensor]:
    return [text[i : i + 8] for i in range(0, len(text), 8)]


def _examples(context: Context, loaded: LoadedModel) -> Examples:
    """The user's rows; no more of them than are learnt where the unpruned model's view of each is kept."""
    request, effort = context.request, context.request.effort
    rows = load_training_data(request.train_data, loaded.tokenizer, effort.sequence_length, context.listener)
    if not request.keeps_teacher:
        return rows
    wanted = effort.tuning_steps * effort.tuning_batch + MOST_HELD_OUT
    return rows.some(wanted, request.seed)


def _export_stage(context: Context, info: SupernetInfo, space: SearchSpace) -> None:
    bits = tuple(sorted({*space.bits, context.request.profile.outer_bits}))
    inputs = {"supernet": info.weights_hash, "bits": list(bits), "widths": list(space.widths)}

    def work() -> Result:
        shutil.rmtree(context.folder.engine, ignore_errors=True)
        made = export(context.folder.supernet, supernet_export(context), bits, context.listener)
        made.prepare(space.widths)
        export(context.folder.base, base_export(context), BASE_BITS, context.listener)
        return {}

    run_stage(context, "export", "Quantizing for ONNX Runtime", inputs, work)


def supernet_export(context: Context) -> Path:
    return context.folder.engine / "supernet"


def base_export(context: Context) -> Path:
    return context.folder.engine / "base"


def _training_text(context: Context) -> Path:
    return context.folder.path / "training-text.npz"


def _training_targets(context: Context) -> Path:
    """What the unpruned model thought while it wrote the training text; gone once that is tuned on."""
    return context.folder.path / "training-targets.pt"
