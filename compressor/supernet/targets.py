"""What the frozen original says about the training text: computed once, before its weights change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "targets.pt"
LIKELY = 16
"""Tokens of each position whose probabilities are compared, beside those of all others in the batch."""


@dataclass(frozen=True)
class Targets:
    """``states`` (examples, length - 1, hidden) before the head; ``likely`` token ids (…, LIKELY).

    ``head`` (vocabulary, hidden) is what reads those states, where it is not the tuned model's own.
    """

    states: Tensor
    likely: Tensor
    head: Tensor | None = None

    def vocabulary(self, rows: list[int]) -> Tensor:
        """Ids of the tokens likely anywhere in these examples, ascending.

        Comparing distributions over these alone costs a tenth of the full vocabulary's logits, which
        take more time than the layers do.
        """
        found: Tensor = torch.unique(self.likely[rows])
        return found.long()

    def first(self, count: int) -> Targets:
        """Those of the first examples, in memory of their own."""
        return Targets(self.states[:count].clone(), self.likely[:count].clone())

    def save(self, path: Path) -> None:
        """Write a file that ``load`` reads, whole or not at all. Raises ``TrainingError`` on a full disk."""
        _write(path, {"states": self.states, "likely": self.likely})

    @classmethod
    def load(cls, path: Path) -> Targets | None:
        """What ``save`` wrote; none if nothing is there."""
        if not path.is_file():
            return None
        kept = torch.load(path, weights_only=True)
        return cls(kept["states"], kept["likely"])


def load_or_compute(
    model: PreTrainedModel, ids: Tensor, batch: int, identity: str, folder: Path | None
) -> Targets:
    """Targets from ``folder`` if they are of this tuning, else computed (and kept there)."""
    path = None if folder is None else folder / NAME
    if path is not None and path.is_file():
        kept = torch.load(path, weights_only=True)
        if kept["identity"] == identity:
            return Targets(kept["states"], kept["likely"])
    targets = compute(model, ids, batch)
    if path is not None:
        _write(path, {"identity": identity, "states": targets.states, "likely": targets.likely})
    return targets


@torch.no_grad()
def compute(model: PreTrainedModel, ids: Tensor, batch: int) -> Targets:
    """Run the model, as it is now, over all ids (examples, length)."""
    states, likely = [], []
    count = min(LIKELY, model.config.vocab_size)
    for rows in torch.split(ids, batch):
        hidden = final_states(model, rows)
        states.append(hidden.cpu())
        likely.append(model.lm_head(hidden).topk(count, dim=-1, sorted=False).indices.int().cpu())
    return Targets(torch.cat(states), torch.cat(likely))


def final_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """States before the head (examples, length - 1, hidden) of every position but the last."""
    output = model.model(ids.to(model.device), use_cache=False)
    states: Tensor = output.last_hidden_state[:, :-1]
    return states


def _write(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, scratch)
    except (OSError, RuntimeError) as error:
        scratch.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {path} ({error}): free disk space and resume") from error
    scratch.replace(path)
