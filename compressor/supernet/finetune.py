"""InstaTune: one short fine-tuning turns the pre-trained model into a super-network.

Source: InstaTune (Sarah et al., arXiv 2308.15609): steps of the super-network and of a random
sub-network alternate. Here the loss is by default the divergence from the frozen original on text
that it wrote itself, so that no data set is needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compressor.errors import TrainingError
from compressor.events import Listener, LossReported, StageProgress, ignore
from compressor.space import SearchSpace, SubNetwork
from compressor.supernet import targets
from compressor.supernet.checkpoint import load_checkpoint, remove_checkpoint, save_checkpoint
from compressor.supernet.data import Examples
from compressor.supernet.elastic import Elastic
from compressor.supernet.losses import IGNORED, cross_entropy, distillation
from compressor.supernet.optimizer import MasterAdamW, warmup_cosine
from compressor.supernet.subnet_sampling import Sampling, sample_subnet
from compressor.supernet.targets import Targets, final_states, load_or_compute

STAGE = "supernet"
SHORT = 256
"""Tokens up to which plain matrix products beat the CPU's fused attention, whose backward is slow."""
CurveListener = Callable[[str, int, float], None]


@dataclass(frozen=True)
class FinetuneConfig:
    """What a fine-tuning is. It ends after ``steps`` or ``minutes``, whichever comes first."""

    steps: int = 60
    minutes: float = math.inf
    batch: int = 8
    lr: float = 2e-4
    loss: Literal["distill", "cross-entropy"] = "distill"
    temperature: float = 1.0
    super_every: int = 2
    sampling: Sampling = "size"
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_norm: float = 1.0
    train_embeddings: bool = False
    checkpoint_minutes: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class FinetuneResult:
    """``super_loss`` and ``sub_loss`` are means over the last quarter of each kind's steps, in nats."""

    steps: int
    tokens: int
    seconds: float
    super_loss: float
    sub_loss: float
    resumed_at: int = 0


def finetune(
    elastic: Elastic,
    space: SearchSpace,
    examples: Examples | Tensor,
    config: FinetuneConfig,
    listener: Listener = ignore,
    on_curve: CurveListener | None = None,
    folder: Path | None = None,
) -> FinetuneResult:
    """Tune the super-network in place; ``folder`` keeps a checkpoint from which a killed run resumes.

    ``on_curve(curve, step, loss)`` gets every step's loss under ``super`` or ``sub``. Raises
    ``TrainingError`` on a loss that is not finite (the model then holds the last good weights) or a
    full disk, ``RunConflictError`` for a checkpoint of another tuning.
    """
    if isinstance(examples, Tensor):
        examples = Examples.of_text(examples)
    tuning = _Tuning(elastic, space, examples, config, folder)
    try:
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
        folder: Path | None,
    ) -> None:
        self.elastic, self.space, self.examples, self.config, self.folder = (
            elastic,
            space,
            examples,
            config,
            folder,
        )
        self.model: Any = elastic.model
        self.step, self.elapsed_s, self.resumed_at = 0, 0.0, 0
        self.losses: dict[str, list[float]] = {"super": [], "sub": []}
        self.rng = np.random.default_rng(config.seed)
        self.order: list[int] = []
        self.attention: str = self.model.config._attn_implementation
        self.trainable = self._choose_parameters()
        self.optimizer = MasterAdamW(self.trainable, config.lr, config.weight_decay, (0.9, 0.95))
        self.identity = _identity(space, config, examples)
        self.targets = self._compute_targets() if config.loss == "distill" else None
        self._resume()

    def run(self, listener: Listener, on_curve: CurveListener) -> FinetuneResult:
        self.model.train()
        self._choose_attention()
        saved_at = started = time.monotonic() - self.elapsed_s
        saved_at += self.elapsed_s
        while self.step < self.config.steps and self.elapsed_s < 60 * self.config.minutes:
            network, loss = self._take_step()
            self.elapsed_s = time.monotonic() - started
            self.losses[network].append(loss)
            listener(LossReported(self.step, network, loss))
            on_curve(network, self.step, loss)
            listener(StageProgress(STAGE, self.step, self._expected_steps(), f"{network} loss {loss:.3f}"))
            if self.folder is not None and time.monotonic() - saved_at > 60 * self.config.checkpoint_minutes:
                save_checkpoint(self.folder, self._state())
                saved_at = time.monotonic()
        return self._result()

    def close(self) -> None:
        self.elastic.reset()
        self.model.eval()
        self.model.set_attn_implementation(self.attention)
        for parameter in self.model.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)

    def _take_step(self) -> tuple[str, float]:
        """One batch through one network; returns its kind and its loss."""
        every = self.config.super_every
        is_super = every > 0 and self.step % every == 0
        subnet = self.space.largest if is_super else sample_subnet(self.space, self.config.sampling, self.rng)
        loss = self._loss(subnet, self._next_rows())
        value = float(loss.detach())
        loss.backward()  # type: ignore[no-untyped-call]
        lr = self.config.lr * warmup_cosine(self._progress(), self.config.warmup)
        norm = self.optimizer.step(lr, self.config.max_norm)
        self.step += 1
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is not finite at step {self.step} (loss {value}, gradient norm {norm}): "
                "lower the learning rate; the weights before that step are kept"
            )
        return ("super" if is_super else "sub"), value

    def _loss(self, subnet: SubNetwork, rows: list[int]) -> Tensor:
        model = self.elastic.activate(subnet)
        ids, labels = self.examples.ids[rows].to(model.device), self.examples.labels[rows].to(model.device)
        hidden = final_states(model, ids).flatten(0, 1)
        wanted = labels[:, 1:].flatten()
        if self.targets is None:
            return cross_entropy(hidden, wanted, model.lm_head.weight)
        counted = wanted != IGNORED
        target = self.targets.states[rows].to(model.device).flatten(0, 1)
        head = model.lm_head.weight.detach()[self.targets.vocabulary(rows).to(model.device)]
        return distillation(hidden[counted], target[counted], head, self.config.temperature)

    def _compute_targets(self) -> Targets:
        return load_or_compute(self.model, self.examples.ids, self.config.batch, self.identity, self.folder)

    def _next_rows(self) -> list[int]:
        """Indices of the next batch; every example once before any comes again."""
        while len(self.order) < self.config.batch:
            self.order += self.rng.permutation(len(self.examples.ids)).tolist()
        rows, self.order = self.order[: self.config.batch], self.order[self.config.batch :]
        return rows

    def _progress(self) -> float:
        return max(self.step / self.config.steps, self.elapsed_s / (60 * self.config.minutes))

    def _expected_steps(self) -> int:
        """Steps that will fit the time, by the pace so far."""
        pace = self.step / max(self.elapsed_s, 1e-9)
        fit = pace * 60 * self.config.minutes
        return max(self.step, min(self.config.steps, int(min(fit, 1e9))))

    def _choose_attention(self) -> None:
        if self.model.device.type == "cpu" and self.examples.ids.shape[1] <= SHORT:
            self.model.set_attn_implementation("eager")

    def _choose_parameters(self) -> list[torch.nn.Parameter]:
        """Freeze what is not trained. Distilling compares states before one head, so that stays."""
        trains_outer = self.config.train_embeddings and self.config.loss != "distill"
        inner = {id(p) for layer in self.model.model.layers for p in layer.parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(trains_outer or id(parameter) in inner)
        return [p for p in self.model.parameters() if p.requires_grad]

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "losses": self.losses,
            "order": self.order,
            "rng": json.dumps(self.rng.bit_generator.state),
            "optimizer": self.optimizer.state_dict(),
        }

    def _resume(self) -> None:
        state = None if self.folder is None else load_checkpoint(self.folder, self.identity)
        if state is None:
            return
        self.step, self.elapsed_s, self.losses = state["step"], state["elapsed_s"], state["losses"]
        self.order, self.resumed_at = state["order"], state["step"]
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _result(self) -> FinetuneResult:
        tokens = self.step * self.config.batch * self.examples.ids.shape[1]
        return FinetuneResult(
            self.step,
            tokens,
            self.elapsed_s,
            _late_mean(self.losses["super"]),
            _late_mean(self.losses["sub"]),
            self.resumed_at,
        )


def discard_checkpoint(folder: Path) -> None:
    """Free the disk once the super-network is saved."""
    remove_checkpoint(folder)
    (folder / targets.NAME).unlink(missing_ok=True)


def _identity(space: SearchSpace, config: FinetuneConfig, examples: Examples) -> str:
    digest = hashlib.sha256(json.dumps([space.to_dict(), asdict(config)], sort_keys=True).encode())
    digest.update(examples.ids.numpy().tobytes())
    digest.update(examples.labels.numpy().tobytes())
    return digest.hexdigest()


def _late_mean(losses: list[float]) -> float:
    late = losses[-max(1, len(losses) // 4) :]
    return sum(late) / len(late) if late else math.nan
