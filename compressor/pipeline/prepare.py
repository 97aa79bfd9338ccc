"""From a base model to a tuned super-network and the exports that candidates are slices of."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from compressor import models
from compressor.compute import fastest_cpu_dtype
from compressor.engines.onnx_export import export
from compressor.engines.onnx_store import FORMAT_VERSION
from compressor.evaluation.agreement import AgreementText, torch_predict
from compressor.events import StageProgress
from compressor.pipeline.accuracy import mixed_rows
from compressor.pipeline.base import compute_device, load_to_compute
from compressor.pipeline.context import Context, Result, run_stage
from compressor.pipeline.needs import MOST_TEXT
from compressor.pipeline.plan import Plan, learns_rounded
from compressor.pipeline.rounding import STAGE, lossy_bits, round_folder
from compressor.pipeline.tuning import training_targets, training_text, training_text_file, tune_supernet
from compressor.runfolder import digest, replace_folder
from compressor.space import SearchSpace, SubNetwork
from compressor.supernet.folder import INFO_NAME, SupernetInfo, read_info, write_info
from compressor.supernet.sampling import sample_text

BASE_BITS = (4, 8)


def prepare(context: Context, plan: Plan) -> tuple[SupernetInfo, SearchSpace]:
    """Do, or find done, everything before the search; the super-network and its search space."""
    base = _base_stage(context, plan)
    text = _text_stage(context, plan, base)
    effort = context.request.effort
    inputs = {
        "text": text,
        "space": context.request.profile.space.model_dump(exclude={"bits"}),
        "effort": [effort.tuning_steps, effort.tuning_minutes, effort.tuning_batch],
        "train_data": context.request.train_data,
        "seed": context.request.seed,
    }
    if learns_rounded(context.request, plan.space):
        inputs["bits"] = [list(plan.space.bits), list(plan.space.outer_bits)]
    if context.request.lora_rank:  # absent otherwise, so that a run from before it stays done
        inputs["lora_rank"] = context.request.lora_rank
    if context.request.tuning.told:
        inputs["tuning"] = context.request.tuning.told
    run_stage(
        context,
        "supernet",
        "Tuning the super-network",
        inputs,
        lambda: tune_supernet(context, plan),
        context.request.effort.tuning_steps,
    )
    info = read_info(context.folder.supernet)
    space = replace(plan.space, drop_order=info.drop_order)
    if context.request.profile.engine == "onnxruntime":
        _rounding_stage(context, info, space)
        _export_stage(context, info, space)
    return info, space


def _base_stage(context: Context, plan: Plan) -> Result:
    def fill(path: Path) -> None:
        models.to_folder(plan.source, path)

    def work() -> Result:
        replace_folder(context.folder.base, fill)
        weights = _own_order(context, plan)
        dtype = torch.bfloat16 if compute_device().type == "cuda" else fastest_cpu_dtype()
        compute = str(dtype).removeprefix("torch.")
        return {"weights": weights, "compute": compute}

    result = run_stage(context, "base", "Loading the model", asdict(plan.source), work)
    if not (context.folder.base / INFO_NAME).is_file():  # of a run from before the unpruned model was a rival
        _own_order(context, plan)
    return result


def _own_order(context: Context, plan: Plan) -> str:
    """Mark the unpruned model as a super-network whose layers and neurons stay in their own order: so it is
    evaluated and tuned like any other. Its weights' hash."""
    layers = tuple(reversed(range(plan.shape.num_layers)))
    return write_info(context.folder.base, layers, "as they came").weights_hash


def _text_stage(context: Context, plan: Plan, base: Result) -> Result:
    """Text that the unpruned model writes: to calibrate and tune on, and other text to score on."""
    effort = context.request.effort
    inputs = {
        "base": base,
        "sequences": [effort.text_sequences, effort.score_sequences, effort.sequence_length],
        "seed": context.request.seed,
    }
    if plan.choices.text_batch != MOST_TEXT:  # absent otherwise, so that a run from before it stays done
        inputs["batch"] = plan.choices.text_batch
    total = (effort.text_sequences + effort.score_sequences) * effort.sequence_length
    written = context.folder.path / "text-written"

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
            batch=plan.choices.text_batch,
            folder=written / digest(inputs),
        )
        ids = sampled.ids.numpy()
        scored = ids[effort.text_sequences :][mixed_rows(effort.score_sequences)]
        text = AgreementText.build(scored, torch_predict(loaded.model), context.request.seed)
        text.save(context.folder.text)
        np.savez_compressed(training_text_file(context), ids=ids[: effort.text_sequences].astype(np.int32))
        if context.request.data_free:
            sampled.targets.first(effort.text_sequences).save(training_targets(context))
        shutil.rmtree(written, ignore_errors=True)
        return {"digest": text.digest}

    return run_stage(context, "text", "Writing text with the unpruned model", inputs, work, total, "tokens")


def _rounding_stage(context: Context, info: SupernetInfo, space: SearchSpace) -> None:
    """Round the super-network, and the unpruned model as anybody could have it, on the run's own text."""
    inputs = {
        "supernet": info.weights_hash,
        "bits": [list(space.bits), list(space.outer_bits)],
        "text": context.folder.result("text"),
    }

    def work() -> Result:
        text = training_text(context)
        for folder, prefixes in (
            (context.folder.base, False),
            (context.folder.supernet, len(space.widths) > 1),
        ):
            round_folder(context, folder, space, text, prefixes)
        return {}

    if lossy_bits(space):
        run_stage(context, STAGE, "Rounding weights by what they read", inputs, work)


def export_tuned(context: Context, space: SearchSpace, subnet: SubNetwork) -> None:
    """Quantize what a sub-network's own tuning wrote, for its candidate alone."""
    bits = _exported_bits(space)
    tuned = context.folder.tuned_alone(subnet.digest)

    def work() -> Result:
        shutil.rmtree(tuned.export, ignore_errors=True)
        widths = tuple(sorted({*subnet.widths}))
        export(tuned.supernet, tuned.export, bits, context.listener).prepare(widths)
        return {}

    inputs = {"weights": read_info(tuned.supernet).weights_hash, "bits": list(bits)}
    run_stage(context, f"export-{subnet.digest}", "Quantizing the tuned winner", inputs, work)


def _export_stage(context: Context, info: SupernetInfo, space: SearchSpace) -> None:
    bits = _exported_bits(space)
    inputs = {
        "supernet": info.weights_hash,
        "bits": list(bits),
        "widths": list(space.widths),
        "format": FORMAT_VERSION,
    }
    searched = context.folder.searched

    def work() -> Result:
        shutil.rmtree(context.folder.engine, ignore_errors=True)
        export(searched.supernet, searched.export, bits, context.listener).prepare(space.widths)
        export(context.folder.base, context.folder.unpruned.export, BASE_BITS, context.listener)
        return {}

    run_stage(context, "export", "Quantizing for ONNX Runtime", inputs, work)


def _exported_bits(space: SearchSpace) -> tuple[int, ...]:
    """In what bits candidates need weights."""
    return tuple(sorted({*space.bits, *space.outer_bits}))
