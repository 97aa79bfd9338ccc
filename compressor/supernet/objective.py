"""What a training step minimises, for one network on some examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.space import SearchSpace, SubNetwork
from compressor.supernet.config import FinetuneConfig
from compressor.supernet.data import Examples
from compressor.supernet.elastic import Elastic
from compressor.supernet.losses import IGNORED, cross_entropy, distillation
from compressor.supernet.processes import Processes
from compressor.supernet.served import Served
from compressor.supernet.targets import Targets, compute, final_states, load_or_compute

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def original_targets(
    model: PreTrainedModel,
    examples: Examples,
    config: FinetuneConfig,
    identity: str,
    folder: Path | None,
    processes: Processes,
) -> Targets | None:
    """What the model, not tuned yet, says about the examples, if that is what it is to be kept close to."""
    if not config.distils or config.teacher != "original":
        return None
    kept_in = folder if processes.rank == 0 else None
    return load_or_compute(model, examples.ids, config.batch, identity, kept_in)


class Objective:
    """The loss of a fine-tuning; ``targets`` are the frozen original's, used where that is the teacher."""

    def __init__(
        self,
        elastic: Elastic,
        space: SearchSpace,
        examples: Examples,
        config: FinetuneConfig,
        processes: Processes,
        targets: Targets | None,
        served: Served,
    ) -> None:
        self._served = served
        self._processes = processes
        self._targets = targets if config.distils and config.teacher == "original" else None
        self._own_head = _unrounded_head(elastic, served)
        self._elastic, self._space, self._examples, self._config = elastic, space, examples, config
        self._model: Any = elastic.model

    def losses(self, networks: list[tuple[str, SubNetwork]], rows: list[int]) -> dict[str, float]:
        """Add the gradients of every network on these examples; mean loss (nats) of each kind.

        Each process adds those of its own part, weighted as a part of the whole.
        """
        counted = int((self._examples.labels[rows][:, 1:] != IGNORED).sum())
        rows = self._processes.part(rows)
        targets, chosen = self._targets, rows
        if self._config.distils and targets is None:
            whole = self._elastic.activate(self._space.largest)
            targets, chosen = compute(whole, self._examples.ids[rows], len(rows)), list(range(len(rows)))
        sums: dict[str, list[float]] = {}
        for kind, subnet in networks:
            with self._served.weights(self._elastic.activate(subnet), subnet):
                value = self._accumulate(rows, targets, chosen, counted, 1.0 / len(networks))
            sums.setdefault(kind, []).append(self._processes.total(value))
        return {kind: sum(values) / len(values) for kind, values in sums.items()}

    @torch.no_grad()
    def evaluate(self, subnet: SubNetwork, rows: list[int]) -> float:
        """Loss (nats a counted token) of a sub-network on examples, which teach it nothing."""
        total, count = 0.0, 0
        with self._served.weights(self._elastic.activate(subnet), subnet):
            for start in range(0, len(rows), self._config.batch):
                part = rows[start : start + self._config.batch]
                labels = self._examples.labels[part][:, 1:].flatten()
                counted = int((labels != IGNORED).sum())
                if counted:
                    total += counted * float(self._loss(part, labels, self._targets, part))
                    count += counted
        return self._processes.total(total / max(count, 1)) / self._processes.count

    def _accumulate(
        self, rows: list[int], targets: Targets | None, chosen: list[int], counted: int, share: float
    ) -> float:
        """Backward through the active network in parts; their share of the loss of ``counted`` tokens.

        Beside other processes, parts without any such token run too: the others wait for their gradients.
        """
        size = max(1, len(rows) // self._config.accumulation)
        total = 0.0
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            labels = self._examples.labels[rows[part]][:, 1:].flatten()
            weight = int((labels != IGNORED).sum()) / max(counted, 1)
            if weight == 0 and self._processes.count == 1:
                continue
            loss = self._loss(rows[part], labels, targets, chosen[part]) * weight
            total += float(loss.detach())
            (loss * share).backward()  # type: ignore[no-untyped-call]
        return total

    def _loss(self, rows: list[int], labels: Tensor, targets: Targets | None, chosen: list[int]) -> Tensor:
        device = self._model.device
        labels = labels.to(device)
        hidden = final_states(self._model, self._examples.ids[rows]).flatten(0, 1)
        head: Tensor = self._model.lm_head.weight
        if not (labels != IGNORED).any():
            return (hidden.sum() + head.sum()) * 0.0
        config = self._config
        terms = []
        if config.loss != "distill":
            weight = config.alpha if config.loss == "both" else 1.0
            terms.append(weight * cross_entropy(hidden, labels, head).float())
        if targets is not None:
            counted = labels != IGNORED
            wanted = targets.states[chosen].to(device).flatten(0, 1)[counted]
            vocabulary = targets.vocabulary(chosen).to(device)
            reads = self._own_head if targets.head is None else targets.head
            theirs = None if reads is None else reads[vocabulary]
            weight = config.gamma if config.loss == "both" else 1.0
            loss = distillation(
                hidden[counted], wanted, head.detach()[vocabulary], config.temperature, theirs
            )
            terms.append(weight * loss.float())
        return torch.stack(terms).sum()


def _unrounded_head(elastic: Elastic, served: Served) -> Tensor | None:
    """What reads a teacher's states where a sub-network's own head is rounded."""
    head: Tensor = elastic.model.lm_head.weight
    return head.detach().clone() if served.outer else None
