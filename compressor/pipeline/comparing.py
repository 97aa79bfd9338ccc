"""A run's sub-network beside what other pruning methods make of the same model at the same size."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.comparison import llm_pruner, slicegpt
from compressor.engines.paired import time_pair
from compressor.engines.pytorch import TorchRunner
from compressor.errors import InputError
from compressor.evaluation.encoding import Encoded
from compressor.events import Listener
from compressor.pipeline.base import compute_device, compute_dtype, load_to_compute
from compressor.pipeline.context import Result, run_stage
from compressor.pipeline.report_data import save_comparison, score_of
from compressor.pipeline.run import Workshop, reopened, tuned_weights, write_report
from compressor.pipeline.tuning import (
    NEURON_SEQUENCES,
    batches,
    told_as,
    training_examples,
    training_text,
    tuned_stage,
    tuning_config,
    tuning_inputs,
)
from compressor.report.data import Compared, Comparison, PairedTest, SideBySide
from compressor.runfolder import Weights, digest
from compressor.space import SearchSpace, SubNetwork, parameter_count
from compressor.supernet.elastic import Elastic
from compressor.supernet.extraction import extract
from compressor.supernet.finetune import finetune
from compressor.supernet.folder import load_supernet, read_info
from compressor.supernet.targets import Targets, compute

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compressor.evaluation.scorer import Likelihoods

Prune = Callable[["PreTrainedModel", Sequence[Tensor], int], "PreTrainedModel"]
METHODS: Mapping[str, Prune] = {"LLM-Pruner": llm_pruner.prune, "SliceGPT": slicegpt.slice_model}
"""In place, by calibration text, to so many parameters."""
UNPRUNED, OURS = "unpruned", "sub-network"
SPLIT = "report"
SPEED_SECONDS = 90.0
"""Longest time that a model and the unpruned one are measured in turns."""


def compare(run: Path, pick: str, minutes: float | None, listener: Listener) -> Comparison:
    """Prune the unpruned model of a finished run by other methods to the parameters of its winner, or of
    another ``pick``; tune each on what the run tuned on, as long as it tuned its super-network and then the
    winner, or for ``minutes``; score all, unquantized, on the items that the search never saw.

    What is finished is kept in the run's folder, and the result shown in its report. Raises ``InputError``.
    """
    with reopened(run, listener) as workshop:
        subnet = workshop.picked(pick).subnet
        shape = workshop.plan.shape
        full = parameter_count(shape, workshop.space.full)
        if parameter_count(shape, subnet) >= full:
            raise InputError(
                f"sub-network {subnet.digest} keeps all {full / 1e6:.1f}M parameters: there is nothing to "
                "prune by other methods. Choose a smaller one with --pick"
            )
        comparison = _Comparing(workshop, subnet, minutes).compare()
    save_comparison(workshop.context.folder, subnet, comparison)
    write_report(run)
    return comparison


class _Comparing:
    """Makes and scores every way to one size, each once."""

    def __init__(self, workshop: Workshop, subnet: SubNetwork, minutes: float | None) -> None:
        self._workshop, self._context, self._subnet = workshop, workshop.context, subnet
        effort = self._context.request.effort
        self._minutes = minutes or effort.tuning_minutes + effort.winner_minutes
        self._steps = effort.tuning_steps * (2 if effort.winner_minutes else 1)
        self._scratch = self._context.folder.path / "comparing"

    def compare(self) -> Comparison:
        if self._context.request.effort.winner_minutes:
            tuned_weights(self._workshop, self._subnet)
        weights = read_info(self._context.folder.weights_of(self._subnet.digest).supernet).weights_hash
        found = {UNPRUNED: self._once("unpruned", UNPRUNED, {}, self._score_unpruned)}
        found[OURS] = self._once(self._subnet.digest, OURS, {"weights": weights}, self._score_ours)
        for name, prune in METHODS.items():
            found[name] = self._once(
                self._of_rival(name), name, self._rival_inputs(), partial(self._try, name, prune)
            )
        shutil.rmtree(self._scratch, ignore_errors=True)
        numerics = str(compute_dtype(self._context)).removeprefix("torch.")
        model = Path(self._workshop.plan.source.name).name
        compared = tuple(self._compared(name, result, found[OURS]) for name, result in found.items())
        return Comparison(model, self._workshop.task.name, numerics, compared)

    def _once(self, stage: str, name: str, inputs: Mapping[str, Any], work: Callable[[], Result]) -> Result:
        told = {
            **inputs,
            "base": self._context.folder.result("base"),
            "task": self._workshop.task.key(SPLIT),
            "workload": self._context.request.profile.workload.model_dump(),
        }
        return run_stage(self._context, _stage(stage), f"Comparing: {name}", told, work)

    def _of_rival(self, name: str) -> str:
        return f"{name.lower()}-{self._size}"

    def _rival_inputs(self) -> dict[str, Any]:
        return {"parameters": self._size, "minutes": self._minutes, **self._learnt()}

    def _learnt(self) -> dict[str, Any]:
        return {"text": self._context.folder.result("text"), **tuning_inputs(self._context)}

    @property
    def _size(self) -> int:
        return parameter_count(self._workshop.plan.shape, self._subnet)

    def _score_unpruned(self) -> Result:
        model = load_to_compute(self._context).model
        return {"parameters": model.num_parameters(), **self._scored(model)}

    def _score_ours(self) -> Result:
        context = self._context
        found, tuned = context.folder.searched, context.folder.weights_of(self._subnet.digest)
        seconds = float(context.folder.result("supernet")["seconds"])
        result: Result = {}
        if tuned != found:
            result["untuned"] = self._scored(self._extracted(found))["score"]
            seconds += float(context.folder.result(tuned_stage(self._subnet))["seconds"])
        model = self._extracted(tuned)
        return {
            **result,
            "parameters": model.num_parameters(),
            **self._scored(model),
            "speed": self._speed(model),
            "seconds": seconds,
        }

    def _extracted(self, weights: Weights) -> PreTrainedModel:
        """The sub-network by itself, where this run computes; its weights are not rounded."""
        whole, _, _ = load_supernet(weights.supernet, compute_dtype(self._context))
        model = extract(whole, replace(self._subnet, bits=()))
        return model.to(compute_device())

    def _try(self, name: str, prune: Prune) -> Result:
        """Prune, score, tune, score again."""
        context = self._context
        loaded = load_to_compute(context)
        distils = context.request.tuning_loss != "cross-entropy"
        examples = training_examples(context, loaded.tokenizer, distils)
        config = replace(
            tuning_config(context, examples, self._workshop.plan.choices.accumulation),
            minutes=self._minutes,
            steps=self._steps,
            recipe="alternate",
            super_every=1,  # there is but one network
            teacher="original",
        )
        teacher = self._teacher(loaded.model, examples.ids) if distils else None
        calibration = batches(training_text(context)[:NEURON_SEQUENCES])
        context.say(f"{name}: pruning to {self._size / 1e6:.1f}M parameters")
        model = prune(loaded.model, calibration, self._size)
        parameters, untuned = model.num_parameters(), self._scored(model)["score"]
        shape = self._workshop.plan.shape
        tuned = finetune(
            Elastic(model),
            SearchSpace(shape, (shape.num_layers,), (shape.intermediate_size,)),
            examples,
            config,
            partial(told_as, context.listener, _stage(self._of_rival(name))),
            folder=self._scratch / self._of_rival(name),
            original=teacher,
        )
        return {
            "parameters": parameters,
            "untuned": untuned,
            **self._scored(model),
            "speed": self._speed(model),
            "seconds": tuned.seconds,
        }

    def _teacher(self, model: PreTrainedModel, ids: Tensor) -> Targets:
        """What the unpruned model says of the examples, kept until all is compared."""
        path = self._scratch / f"teacher-{digest(self._learnt())}.pt"
        targets = Targets.load(path)
        if targets is None:
            self._context.say("asking the unpruned model about the training text")
            targets = compute(model, ids, self._context.request.effort.tuning_batch)
            targets.save(path)
        return replace(targets, head=model.lm_head.weight.detach().clone())

    def _scored(self, model: PreTrainedModel) -> Result:
        score = self._workshop.task.score_artefact(PlainArtefact(model.eval()), SPLIT)
        return {"score": score.metrics(), "items": base64.b64encode(score.items).decode()}

    def _speed(self, model: PreTrainedModel) -> dict[str, float]:
        """Its times over the unpruned model's, in turns, both as they stand."""
        workload = self._context.request.profile.workload
        unpruned = load_to_compute(self._context).model
        with torch.inference_mode():
            runners = TorchRunner(model, workload), TorchRunner(unpruned, workload)
            return time_pair(*runners, workload, max_seconds=SPEED_SECONDS)[2].to_dict()

    def _compared(self, name: str, result: Result, ours: Result) -> Compared:
        return Compared(
            name,
            result["parameters"],
            score_of(result["score"]),
            untuned=score_of(result["untuned"]) if "untuned" in result else None,
            ttft=_beside(result, "ttft"),
            tpot=_beside(result, "tpot"),
            tuned_minutes=result.get("seconds", 0.0) / 60,
            test=self._test(name, result, ours) if name in METHODS else None,
        )

    def _test(self, name: str, result: Result, ours: Result) -> PairedTest:
        items = [base64.b64decode(each["items"]) for each in (ours, result)]
        test = self._workshop.task.paired(*items)
        return PairedTest(name, test.p_value, test.gained, test.lost)


@dataclass(frozen=True)
class PlainArtefact:
    """Any causal language model of transformers, run by its own code, a sequence at a time."""

    model: PreTrainedModel

    def top1(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The likeliest next token at every position, [batch, tokens] for ids [batch, tokens]."""
        return np.stack([self._logits(row).argmax(-1).cpu().numpy() for row in ids])

    def likelihoods(self, encoded: Sequence[Encoded], *, greedy: bool = True) -> Likelihoods:
        from compressor.evaluation.scorer import score_by_logits

        del greedy  # known in any case
        return score_by_logits(encoded, lambda ids: self._logits(ids).float().cpu().numpy())

    @torch.inference_mode()
    def _logits(self, ids: NDArray[np.int64]) -> Tensor:
        """Logits [T, vocabulary] of one sequence [T]."""
        given = torch.from_numpy(np.asarray(ids, np.int64))[None].to(self.model.device)
        logits: Tensor = self.model(input_ids=given, use_cache=False).logits[0]
        return logits


def _stage(of: str) -> str:
    return f"compare-{of}"


def _beside(result: Result, figure: str) -> SideBySide | None:
    if "speed" not in result:
        return None
    ratio = result["speed"]
    return SideBySide(ratio[f"{figure}_ratio"], ratio[f"{figure}_ratio_interval"] / 2)
