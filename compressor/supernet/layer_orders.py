"""Orders in which layers are dropped, found by what the model loses without them.

Every order is nested: the layers kept at a smaller depth are among those kept at a larger one. The
loss is the divergence of the next-token distributions from the whole model's on calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_AT_ONCE = 256
"""Positions whose logits exist at the same time."""


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
    """Drop the layer that hurts least, recompute, repeat; the last ones by their final losses.

    ``drops`` layers (half of them unless given) are chosen one by one, each by a pass over all that are
    left; the order of the rest is that of the last pass.
    """
    trial = _Trial(model, batches)
    left = list(range(trial.depth))
    dropped: list[int] = []
    losses: dict[int, float] = {}
    for _ in range(drops if drops is not None else trial.depth // 2):
        losses = dict(trial.losses_without_each(left))
        worst = min(losses, key=lambda layer: losses[layer])
        dropped.append(worst)
        left.remove(worst)
    return (*dropped, *sorted(left, key=lambda layer: losses.get(layer, float(layer))))


class _Trial:
    """Runs the model's layers one by one, so that what lies below a dropped layer is computed once."""

    def __init__(self, model: Any, batches: Sequence[Tensor]) -> None:
        self._model = model
        self._layers: nn.ModuleList = model.model.layers
        self._embedded = [model.model.embed_tokens(ids.to(model.device)) for ids in batches]
        self._rotary = [
            model.model.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None]) for x in self._embedded
        ]
        whole = list(range(self.depth))
        self._wanted = [self._final(self._through(b, x, whole)) for b, x in enumerate(self._embedded)]

    @property
    def depth(self) -> int:
        return len(self._layers)

    def losses_without_each(self, left: list[int]) -> Iterator[tuple[int, float]]:
        """(layer, divergence in nats a token of the layers ``left`` without it)."""
        below = list(self._embedded)
        for position, layer in enumerate(left):
            rest = left[position + 1 :]
            total = sum(self._divergence(b, self._through(b, x, rest)) for b, x in enumerate(below))
            yield layer, total / len(below)
            below = [self._through(b, x, [layer]) for b, x in enumerate(below)]

    def _through(self, batch: int, hidden: Tensor, layers: list[int]) -> Tensor:
        for index in layers:
            hidden = self._layers[index](hidden, position_embeddings=self._rotary[batch])
        return hidden

    def _final(self, hidden: Tensor) -> Tensor:
        final: Tensor = self._model.model.norm(hidden).flatten(0, 1)
        return final

    def _divergence(self, batch: int, hidden: Tensor) -> float:
        wanted, got = self._wanted[batch], self._final(hidden)
        total = 0.0
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            target = self._model.lm_head(wanted[rows]).float().log_softmax(-1)
            found = self._model.lm_head(got[rows]).float().log_softmax(-1)
            total += float(F.kl_div(found, target, reduction="sum", log_target=True))
        return total / len(wanted)
