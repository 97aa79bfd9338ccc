"""Leading layers computed once for all sub-networks that begin with them.

Two sub-networks whose first layers are the same, in the same widths and bits, have the same hidden
states after them. A search asks for many that begin alike, the more so the further it has come. What is
kept is used as it is, so that nothing changes in what is computed, to the last bit.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from compressor.evaluation.schedule import Step
from compressor.space import SubNetwork

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_BYTES = 4 << 30
LEAST_ENTRIES = 16
"""Where fewer fit into the limit, nothing is kept: it would be gone before it is met again."""
AHEAD = (1, 2, 4, 8, 16)
"""After how many layers past those known already states are kept: close by, since most sub-networks soon
part, and far ahead for those that don't."""

Prefix = tuple[str, tuple[tuple[int, int, int], ...]]
"""What was asked, and (layer, width, bits) of the leading layers."""


class SharedLayers:
    """Hidden states after leading layers of ``model``, whose weights don't change meanwhile.

    ``active`` tells which sub-network it computes now, None if it is none.
    At most ``limit_bytes`` of them are kept, on the model's device (a quarter of the memory that is free
    there, and no more than 4 GiB, unless given); those unused for longest go first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        active: Callable[[], SubNetwork | None],
        limit_bytes: int | None = None,
    ) -> None:
        self._model, self._active = model, active
        self._limit_bytes = _room_bytes(model.device) if limit_bytes is None else limit_bytes
        self.kept_bytes = 0
        self._kept: OrderedDict[Prefix, tuple[Tensor, ...]] = OrderedDict()
        self.layers_asked = self.layers_computed = 0

    def passage(self, model: PreTrainedModel, steps: Sequence[Step]) -> Passage | None:
        """The way of ``steps`` through the sub-network that is active; None if another model runs them."""
        subnet = self._active()
        if subnet is None or model is not self._model:
            return None
        architecture = tuple(zip(subnet.layers, subnet.widths, subnet.bits, strict=True))
        question = f"{_digest(steps)} embedded in {subnet.embed_bits} bits"
        known = next(
            (n for n in range(len(architecture) - 1, 0, -1) if (question, architecture[:n]) in self._kept), 0
        )
        states: tuple[Tensor, ...] = ()
        if known:
            states = self._kept[question, architecture[:known]]
            self._kept.move_to_end((question, architecture[:known]))
        self.layers_asked += len(architecture)
        self.layers_computed += len(architecture) - known
        worth = LEAST_ENTRIES * self._state_bytes(steps) <= self._limit_bytes
        depths = [known + n for n in AHEAD if known + n < len(architecture)] if worth else []
        ahead: dict[int, dict[int, Tensor]] = {depth: {} for depth in depths}
        return Passage(known, states, ahead, (question, architecture))

    def keep(self, passage: Passage) -> None:
        """Keep the states that a finished passage left."""
        question, architecture = passage.asked
        for depth, states in passage.left.items():
            ordered = tuple(states[number] for number in sorted(states))
            self._kept[question, architecture[:depth]] = ordered
            self.kept_bytes += _bytes(ordered)
        while self.kept_bytes > self._limit_bytes:
            self.kept_bytes -= _bytes(self._kept.popitem(last=False)[1])

    def _state_bytes(self, steps: Sequence[Step]) -> int:
        """Of the hidden states of all steps after one layer."""
        width: int = self._model.config.hidden_size
        dtype: torch.dtype = self._model.dtype
        return sum(len(step.ids) for step in steps) * width * dtype.itemsize


@dataclass
class Passage:
    """One evaluation's way through its layers, of which the first ``known`` are computed already.

    ``states`` are the hidden states after those, one a step; ``left`` are those to be kept, by depth and
    step.
    """

    known: int
    states: tuple[Tensor, ...]
    left: dict[int, dict[int, Tensor]]
    asked: Prefix = field(repr=False)

    def leave(self, depth: int, number: int, hidden: Tensor) -> None:
        """Note a step's hidden states after so many layers."""
        if depth in self.left:
            self.left[depth][number] = hidden


def _room_bytes(device: torch.device) -> int:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return min(MOST_BYTES, int(free) // 4)


def _bytes(states: Iterable[Tensor]) -> int:
    return sum(state.nbytes for state in states)


def _digest(steps: Sequence[Step]) -> str:
    digest = hashlib.sha256()
    for step in steps:
        for tensor in (step.ids, step.positions):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
