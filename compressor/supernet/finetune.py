"""InstaTune: one short fine-tuning turns the pre-trained model into a super-network.

Source: InstaTune (Sarah et al., arXiv 2308.15609): steps of the super-network and of a random
sub-network alternate. Here the loss is by default the divergence from the frozen original on text
that it wrote itself, so that no data set is needed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import Parameter

from compressor.errors import InputError, TrainingError
from compressor.events import Listener, LossReported, StageProgress, ignore
from compressor.heap import freed_memory_kept
from compressor.space import SearchSpace, parameter_count
from compressor.supernet import targets
from compressor.supernet.checkpoint import (
    load_checkpoint,
    remove_checkpoint,
    sample,
    save_checkpoint,
    tuning_identity,
)
from compressor.supernet.config import FinetuneConfig, FinetuneResult
from compressor.supernet.data import Examples
from compressor.supernet.elastic import Elastic
from compressor.supernet.objective import Objective, original_targets
from compressor.supernet.optimizer import MasterAdamW, warmup_cosine
from compressor.supernet.processes import Processes, join_processes
from compressor.supernet.served import Served
from compressor.supernet.sharding import sharded
from compressor.supernet.subnet_sampling import Network, networks_of_step
from compressor.supernet.targets import Targets
from compressor.supernet.trained import trained_parameters

__all__ = ["Examples", "FinetuneConfig", "FinetuneResult", "discard_checkpoint", "finetune"]

STAGE = "supernet"
SHORT = 256
"""Tokens up to which plain matrix products beat the CPU's fused attention, whose backward is slow."""
CurveListener = Callable[[str, int, float], None]


def finetune(
    elastic: Elastic,
    space: SearchSpace,
    examples: Examples | Tensor,
    config: FinetuneConfig,
    listener: Listener = ignore,
    on_curve: CurveListener | None = None,
    folder: Path | None = None,
    original: Targets | None = None,
    served: Served | None = None,
) -> FinetuneResult:
    """Tune the super-network in place; ``folder`` keeps a checkpoint from which a killed run resumes.

    ``original`` is what the frozen original says about the examples, where that is known already.
    ``served`` says how sub-networks are served: without it none is rounded, and sizes are parameters.

    ``on_curve(curve, step, loss)`` gets losses under ``super``, ``sub`` and ``held-out``. Raises
    ``TrainingError`` on a loss that is not finite (the model then holds the last good weights) or a
    full disk, ``RunConflictError`` for a checkpoint of another tuning.
    """
    if isinstance(examples, Tensor):
        examples = Examples.of_text(examples)
    started = time.monotonic()
    processes = join_processes()
    served = served or Served(lambda subnet: float(parameter_count(space.shape, subnet)))
    _check(config, examples, processes, served)
    on_cpu = elastic.model.device.type == "cpu"
    with freed_memory_kept() if on_cpu else nullcontext(), trained_parameters(elastic, config) as trained:
        identity = tuning_identity(space, config, examples, elastic.model, trained)
        processes.must_agree(identity + sample(elastic.model.parameters()))
        if original is None:
            original = original_targets(elastic.model, examples, config, identity, folder, processes)
        with sharded(elastic, trained, processes) as (active, parameters):
            objective = Objective(active, space, examples, config, processes, original, served)
            parameters = [*parameters, *served.shifts.values()]
            tuning = _Tuning(
                active, space, examples, config, parameters, objective, processes, identity, folder, served
            )
            try:
                tuning.resume(time.monotonic() - started)
                return tuning.run(listener, on_curve or (lambda *_: None))
            finally:
                tuning.close()


class _Tuning:
    """The state of one fine-tuning."""

    def __init__(
        self,
        elastic: Elastic,
        space: SearchSpace,
        examples: Examples,
        config: FinetuneConfig,
        trained: list[Parameter],
        objective: Objective,
        processes: Processes,
        identity: str,
        folder: Path | None,
        served: Served,
    ) -> None:
        self.elastic, self.space, self.config, self.folder = elastic, space, config, folder
        self.examples = examples
        taught = len(examples.ids) - config.held_out
        self.learnable = examples.learnable[:taught].nonzero()[:, 0].numpy()
        self.model: Any = elastic.model
        self.step, self.resumed_at = 0, 0
        self.losses: dict[str, list[float]] = {"super": [], "sub": []}
        self.rng = np.random.default_rng(config.seed)
        self.order: list[int] = []
        self.checks: list[float] = []
        self.attention: str = self.model.config._attn_implementation
        self.trained, self.objective = trained, objective
        self.processes, self.identity, self.served = processes, identity, served
        self.optimizer = MasterAdamW(trained, config.lr, config.weight_decay, (0.9, 0.95))
        self.elapsed_s = 0.0

    def resume(self, spent_s: float) -> None:
        """Go on from the folder's checkpoint, if there is one; else ``spent_s`` have passed already."""
        self.elapsed_s = self.processes.total(spent_s) / self.processes.count
        state = None if self.folder is None else load_checkpoint(self.folder, self.identity)
        if state is None:
            return
        self.step, self.elapsed_s, self.losses = state["step"], state["elapsed_s"], state["losses"]
        self.order, self.checks, self.resumed_at = state["order"], state["checks"], state["step"]
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.optimizer.load_state_dict(state["optimizer"])

    def run(self, listener: Listener, on_curve: CurveListener) -> FinetuneResult:
        self._prepare_model()
        started = time.monotonic() - self.elapsed_s
        saved_at = self.elapsed_s
        while not self._over():
            losses = self._take_step()
            self.elapsed_s = self.processes.total(time.monotonic() - started) / self.processes.count
            for network, loss in losses.items():
                self.losses[network].append(loss)
                listener(LossReported(self.step, network, loss))
                on_curve(network, self.step, loss)
            detail = ", ".join(f"{network} loss {loss:.3f}" for network, loss in losses.items())
            listener(StageProgress(STAGE, self.step, self._expected_steps(), detail))
            self._check_held_out(on_curve)
            if self.elapsed_s - saved_at > 60 * self.config.checkpoint_minutes:
                self._save()
                saved_at = self.elapsed_s
        return self._result()

    def _over(self) -> bool:
        out_of_time = self.elapsed_s >= 60 * self.config.minutes
        return self.step >= self.config.steps or out_of_time or self._stopped_early()

    def _stopped_early(self) -> bool:
        best = min(range(len(self.checks)), key=lambda i: self.checks[i], default=0)
        return len(self.checks) - 1 - best >= self.config.patience

    def _check_held_out(self, on_curve: CurveListener) -> None:
        if self.config.held_out and self.step % self.config.check_every == 0:
            rows = list(range(len(self.examples.ids)))[-self.config.held_out :]
            self.model.eval()
            self.checks.append(self.objective.evaluate(self.config.only or self.space.smallest, rows))
            self.model.train()
            on_curve("held-out", self.step, self.checks[-1])

    def close(self) -> None:
        self.elastic.reset()
        self.model.eval()
        self.model.set_attn_implementation(self.attention)
        self.model.gradient_checkpointing_disable()

    def _take_step(self) -> dict[str, float]:
        """One batch through the step's networks; the loss of each kind."""
        config = self.config
        losses = self.objective.losses(self._networks(), self._next_rows())
        if not self.processes.sharded:
            self.processes.add_up(p.grad for p in self.trained if p.grad is not None)
        lr = config.lr * warmup_cosine(self._progress(), config.warmup)
        norm = self.optimizer.step(lr, config.max_norm)
        self.step += 1
        if not all(math.isfinite(value) for value in (norm, *losses.values())):
            raise TrainingError(
                f"the loss is not finite at step {self.step} (losses {losses}, gradient norm {norm}): "
                "lower the learning rate; the weights before that step are kept"
            )
        return losses

    def _networks(self) -> list[Network]:
        config = self.config
        if config.only is not None:
            return [("sub", config.only)]
        return networks_of_step(
            self.space,
            config.recipe,
            config.super_every,
            config.sampling,
            self.step,
            self.rng,
            config.budget,
            self.served.size,
        )

    def _next_rows(self) -> list[int]:
        """Indices of the next batch; every example with something to learn once before any comes again."""
        while len(self.order) < self.config.batch:
            self.order += self.rng.permutation(self.learnable).tolist()
        rows, self.order = self.order[: self.config.batch], self.order[self.config.batch :]
        return rows

    def _progress(self) -> float:
        return max(self.step / self.config.steps, self.elapsed_s / (60 * self.config.minutes))

    def _expected_steps(self) -> int:
        """Steps that will fit the time, by the pace so far."""
        pace = self.step / max(self.elapsed_s, 1e-9)
        fit = pace * 60 * self.config.minutes
        return max(self.step, min(self.config.steps, int(min(fit, 1e9))))

    def _prepare_model(self) -> None:
        self.model.train()
        if self.config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.model.device.type == "cpu" and self.examples.ids.shape[1] <= SHORT:
            self.model.set_attn_implementation("eager")

    def _save(self) -> None:
        if self.folder is None:
            return
        state, failure = self._state(), None
        if self.processes.rank == 0:
            try:
                save_checkpoint(self.folder, state)
            except TrainingError as error:
                failure = error
        self.processes.fail_together(failure)

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "losses": self.losses,
            "checks": self.checks,
            "order": self.order,
            "rng": json.dumps(self.rng.bit_generator.state),
            "optimizer": self.optimizer.state_dict(),
        }

    def _result(self) -> FinetuneResult:
        tokens = self.step * self.config.batch * self.examples.ids.shape[1]
        return FinetuneResult(
            self.step,
            tokens,
            self.elapsed_s,
            _late_mean(self.losses["super"]),
            _late_mean(self.losses["sub"]),
            self.resumed_at,
            self._stopped_early(),
        )


def discard_checkpoint(folder: Path) -> None:
    """Free the disk once the super-network is saved."""
    remove_checkpoint(folder)
    (folder / targets.NAME).unlink(missing_ok=True)


def _check(config: FinetuneConfig, examples: Examples, processes: Processes, served: Served) -> None:
    """Raise ``InputError`` for settings that the examples or the processes do not allow."""
    if config.held_out >= len(examples.ids):
        raise InputError(
            f"holding out {config.held_out} of {len(examples.ids)} examples leaves none to train on"
        )
    if not examples.learnable[: len(examples.ids) - config.held_out].any():
        raise InputError("no training example has anything to learn: are its answers empty, or cut off?")
    if served.rounds and (processes.sharded or config.lora_rank):
        raise InputError("weights that are shared out or frozen cannot learn rounded: tune without rounding")
    if config.batch < processes.count:
        raise InputError(f"a batch of {config.batch} is too small for {processes.count} processes")
    if processes.sharded and config.batch % (processes.count * config.accumulation):
        raise InputError(
            f"a batch of {config.batch} does not split evenly over {processes.count} processes with FSDP in "
            f"{config.accumulation} parts: make it a multiple of {processes.count * config.accumulation}"
        )
    if processes.sharded and config.train_embeddings:
        raise InputError("FSDP shares out the layers alone: don't train the embeddings with it")


def _late_mean(losses: list[float]) -> float:
    late = losses[-max(1, len(losses) // 4) :]
    return sum(late) / len(late) if late else math.nan
