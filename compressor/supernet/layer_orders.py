"""Orders in which layers are dropped, found by what the model loses without them.

Every order is nested: the layers kept at a smaller depth are among those kept at a larger one. The
loss is the divergence of the next-token distributions from the whole model's on calibration text, over
the tokens that the whole model holds likely; a full vocabulary would cost more than the layers do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIKELY = 16
"""Tokens of each position's distribution that make up the vocabulary that is compared."""
LEAST_TRIED = 4
"""Candidates tried at least for each layer dropped, however clear the first looks."""
ROWS, LENGTH = 8, 48
"""Calibration text used: a ranking needs far less of it than a training, and every pass runs on it."""


@torch.no_grad()
def leave_one_out_order(model: PreTrainedModel, batches: Sequence[Tensor]) -> tuple[int, ...]:
    """Layers by the divergence that each alone causes when it is dropped, the least first."""
    trial = _Trial(model, batches)
    losses = dict(trial.losses_without_each(list(range(trial.depth))))
    return tuple(sorted(losses, key=lambda layer: losses[layer]))


@torch.no_grad()
def greedy_order(
    model: PreTrainedModel, batches: Sequence[Tensor], drops: int | None = None
) -> tuple[int, ...]:
    """Drop the layer that hurts least, recompute, repeat; the last ones by their latest losses.

    ``drops`` layers (a third of them unless given) are chosen one by one. Candidates are tried in the
    order of their latest losses until no other can be expected to hurt less (lazy greedy: Minoux,
    1978), which spares most of the passes.
    """
    trial = _Trial(model, batches)
    left = list(range(trial.depth))
    dropped: list[int] = []
    hurts = dict(trial.losses_without_each(left))
    before = 0.0
    for _ in range(drops if drops is not None else trial.depth // 3):
        states = trial.states_below_each(left)
        fresh: dict[int, float] = {}
        for layer in sorted(left, key=lambda layer: hurts[layer]):
            if len(fresh) >= LEAST_TRIED and hurts[layer] + before >= min(fresh.values()):
                break
            fresh[layer] = trial.loss_without(left, layer, states[layer])
        least = min(fresh, key=lambda layer: fresh[layer])
        hurts.update({layer: loss - before for layer, loss in fresh.items()})
        before = fresh[least]
        dropped.append(least)
        left.remove(least)
    return (*dropped, *sorted(left, key=lambda layer: hurts[layer]))


class _Trial:
    """Runs the model's layers one by one, so that what lies below a dropped layer is computed once."""

    def __init__(self, model: Any, batches: Sequence[Tensor]) -> None:
        self._model = model
        self._layers: nn.ModuleList = model.model.layers
        ids = torch.cat([batch[:, :LENGTH] for batch in batches])[:ROWS].to(model.device)
        self._embedded = model.model.embed_tokens(ids)
        self._rotary = model.model.rotary_emb(
            self._embedded, torch.arange(ids.shape[1], device=ids.device)[None]
        )
        final = model.model.norm(self._through(self._embedded, list(range(self.depth)))).flatten(0, 1)
        logits = model.lm_head(final)
        likely = logits.topk(min(LIKELY, logits.shape[-1]), dim=-1).indices.unique()
        self._head = model.lm_head.weight[likely]
        self._target = logits[:, likely].float().log_softmax(-1)

    @property
    def depth(self) -> int:
        return len(self._layers)

    def losses_without_each(self, left: list[int]) -> Iterator[tuple[int, float]]:
        """(layer, divergence in nats a token of the layers ``left`` without it)."""
        for layer, below in self.states_below_each(left).items():
            yield layer, self.loss_without(left, layer, below)

    def states_below_each(self, left: list[int]) -> dict[int, Tensor]:
        """What enters each of the layers ``left`` when only they run."""
        hidden, states = self._embedded, {}
        for layer in left:
            states[layer] = hidden
            hidden = self._through(hidden, [layer])
        return states

    def loss_without(self, left: list[int], layer: int, below: Tensor) -> float:
        """Divergence in nats a token of the layers ``left`` without ``layer``, which ``below`` enters."""
        return self._divergence(self._through(below, [index for index in left if index > layer]))

    def _through(self, hidden: Tensor, layers: list[int]) -> Tensor:
        for index in layers:
            hidden = self._layers[index](hidden, position_embeddings=self._rotary)
        return hidden

    def _divergence(self, hidden: Tensor) -> float:
        final = self._model.model.norm(hidden).flatten(0, 1)
        found = F.linear(final, self._head).float().log_softmax(-1)
        return float(F.kl_div(found, self._target, reduction="batchmean", log_target=True))
