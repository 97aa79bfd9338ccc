"""A LLaMA-like model's own weights, run over packed trees without padding, by a pass of our own.

Linear layers see real tokens only, packed [tokens, hidden]; attention runs on padded batches of trees
of like length; outputs are taken where a choice is scored. The model is read as it stands, so an
activated sub-network (fewer layers, narrower MLPs) is scored as such, without copying weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import InputError
from compressor.evaluation import attention, kernels
from compressor.evaluation.head import Head
from compressor.evaluation.kernels import Workspace
from compressor.evaluation.layer import Layer, Rotation, has_plain_products, normed_states
from compressor.evaluation.products import Means
from compressor.evaluation.schedule import LONG_ATTENTION, Call, Rows, Step
from compressor.evaluation.shared_layers import Passage, SharedLayers
from compressor.evaluation.workers import most_workers, side_by_side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONTIGUOUS = torch.contiguous_format
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")

Kept = list[tuple[Tensor, Tensor]]
"""Keys and values [key-value heads, tokens, head dim] of a prefix, one pair a layer that is computed."""


class PackedModel:
    """Runs ``Step``s on a causal LM of the Llama, Mistral, Qwen2 or Qwen3 kind, in its own numerics.

    With ``shared``, leading layers that another sub-network has computed for the same steps are not
    computed again.
    """

    def __init__(self, model: PreTrainedModel, shared: SharedLayers | None = None) -> None:
        base: Any = model.base_model
        config: Any = model.config
        missing = [name for name in _PARTS if not hasattr(base, name)]
        if missing:
            raise InputError(
                f"a {type(model).__name__} cannot be scored: it has no {', '.join(missing)}; "
                "use a LLaMA-like model"
            )
        self.model, self.base = model, base
        layers = base.layers[: config.num_hidden_layers]
        self.hidden_size: int = config.hidden_size
        self.dtype: torch.dtype = base.norm.weight.dtype
        self.device: torch.device = base.norm.weight.device
        self._shared = shared
        self._known = 0
        self._kept: dict[int, Kept] = {}
        self._memory = Workspace()
        self._rotary_lock = threading.Lock()
        self.apart = self.device.type == "cpu" and all(map(has_plain_products, layers))
        """Whether passes that don't depend on each other may run side by side."""
        threads = torch.get_num_threads() // (most_workers() if self.apart else 1)
        self.means = Means.of(base.norm.weight, threads)
        self.layers = [Layer.of(layer, self.means) for layer in layers]
        self.head = Head(model.get_output_embeddings(), self.device, self.means, self._memory)

    def each(self, work: Callable[[int], None], numbers: Sequence[int]) -> None:
        """Do ``work`` on each number; on a CPU side by side where the model's modules allow it."""
        if self.apart:
            side_by_side(work, numbers)
        else:
            for number in numbers:
                work(number)

    def run(self, steps: list[Step], num_rows: int) -> Tensor:
        """Final hidden states [num_rows, hidden] at all scored positions, in the order of score rows."""
        outputs = torch.empty(num_rows, self.hidden_size, dtype=self.dtype, device=self.device)
        self._kept = {}
        passage = self._shared.passage(self.model, steps) if self._shared else None
        self._known = passage.known if passage else 0

        def compute(number: int) -> None:
            hidden = self._forward(steps[number], passage, number)
            if hidden is not None:
                outputs[steps[number].rows] = normed_states(self.base.norm, hidden, self.means.fused)

        starts = [number for number, step in enumerate(steps) if step.waits or number == 0]
        for start, end in pairwise([*starts, len(steps)]):
            self.each(compute, range(start, end))
            for prefix in (prefix for step in steps[start:end] for prefix in step.drop):
                self._kept.pop(prefix, None)
        self._kept = {}
        if self._shared and passage:
            self._shared.keep(passage)
        return outputs

    def _forward(self, step: Step, passage: Passage | None, number: int) -> Tensor | None:
        hidden: Tensor
        if passage and passage.known:
            hidden = passage.states[number]
        else:
            hidden = self.base.embed_tokens(step.ids).to(self.dtype)
        with self._rotary_lock:  # some kinds of it change themselves
            cos, sin = (t[0, :, None] for t in self.base.rotary_emb(hidden, step.positions[None]))
        kept: dict[int, Kept] = {prefix: [] for prefix, _, _ in step.keep}
        last = len(self.layers) - 1
        rotation = Rotation(cos, sin, in_attention=self.means.fused and not step.keep)
        tiled = self.means.tiled and attention.suit(step.calls, self.layers[0].head_dim)
        masks = [] if tiled else [call.mask(call.full, self.dtype) for call in step.calls]
        places = [_Places.of(call) for call in step.calls]
        for index, layer in enumerate(self.layers[self._known :], self._known):
            normed = normed_states(layer.input_norm, hidden, self.means.fused)
            query, key, value = layer.project(normed, rotation, self._memory)
            for prefix, start, end in step.keep:
                kept[prefix].append(self._extended(step, index, start, key[start:end], value[start:end]))
            if index == last:
                if not len(step.scored):
                    self._kept |= kept
                    return None
                hidden = hidden.index_select(0, step.scored)
            mixed = self._attention(step, index, (query, key, value), rotation, places, masks)
            hidden = layer.finish(hidden, mixed, self._memory)
            if passage and index < last:
                passage.leave(index + 1, number, hidden)
        self._kept |= kept
        return hidden

    def _extended(
        self, step: Step, layer: int, start: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A prefix's keys and values with those of what it hangs from, as later steps read them."""
        parent = next(call.parent for call in step.calls if call.start <= start < call.end)
        own = key.transpose(0, 1), value.transpose(0, 1)
        if parent < 0:
            return own[0].clone(memory_format=_CONTIGUOUS), own[1].clone(memory_format=_CONTIGUOUS)
        before = self._kept[parent][layer - self._known]
        return torch.cat([before[0], own[0]], 1), torch.cat([before[1], own[1]], 1)

    def _attention(
        self,
        step: Step,
        layer: int,
        states: tuple[Tensor, Tensor, Tensor],
        rotation: Rotation,
        places: Sequence[tuple[_Places, _Places]],
        masks: Sequence[Tensor],
    ) -> Tensor:
        """Attention output [N, heads * head dim] of all rows; of the scored ones in the last layer.

        Without masks it is the matrix unit's kernel that computes it.
        """
        last = layer == len(self.layers) - 1
        before = [
            self._kept[call.parent][layer - self._known] if call.parent >= 0 else None for call in step.calls
        ]
        scaling = self.layers[layer].scaling
        if not masks:
            queries = [call.scored if last else call.full for call in step.calls]
            angles = (rotation.cos, rotation.sin) if rotation.in_attention else None
            return attention.attend(step.calls, queries, states, angles, scaling, before, self._memory)
        parts = []
        for call, past, (full, keys), mask in zip(step.calls, before, places, masks, strict=True):
            if not last:
                parts.append(self._attend(call, states, rotation, scaling, full, keys, past, mask))
            elif call.scored is not None:
                mask = call.mask(call.scored, self.dtype)
                scored = _Places(call.scored)
                parts.append(self._attend(call, states, rotation, scaling, scored, keys, past, mask))
        return torch.cat(parts)

    def _attend(
        self,
        call: Call,
        states: tuple[Tensor, Tensor, Tensor],
        rotation: Rotation,
        scaling: float,
        queries: _Places,
        keys: _Places,
        past: tuple[Tensor, Tensor] | None,
        mask: Tensor,
    ) -> Tensor:
        """Attention output [n, heads * head dim] of a call's queries, on padded batches."""
        q, k, v = _by_heads(states, queries, keys, past or (None, None), rotation, scaling)
        if call.longest > LONG_ATTENTION:
            return _flash_attention(q, k, v, mask, queries)
        return _attention(q, k, v, mask, queries, self.means.fused)


class _Places:
    """Where the rows of a call lie by heads: found once a pass, since plans are to stay small."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.gather = cache(rows.gather_by_head)
        self.valid = cache(rows.valid_by_head)

    @classmethod
    def of(cls, call: Call) -> tuple[_Places, _Places]:
        """Of its queries and of its keys."""
        queries = cls(call.full)
        return queries, queries if call.keys is call.full else cls(call.keys)


def _by_heads(
    states: tuple[Tensor, Tensor, Tensor],
    queries: _Places,
    keys: _Places,
    before: tuple[Tensor, Tensor] | tuple[None, None],
    rotation: Rotation,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, L, D], and keys and values [B, G, P + K, D] with those of a prefix ``before`` them."""
    query, key, value = states
    if rotation.in_attention:
        angles = rotation.cos, rotation.sin
        q_rows, k_rows = (places.rows for places in (queries, keys))
        return (
            kernels.rotated_by_head(query, q_rows.gather, q_rows.length, *angles, scaling, None),
            kernels.rotated_by_head(key, k_rows.gather, k_rows.length, *angles, 1.0, before[0]),
            kernels.by_head(value, k_rows.gather, k_rows.length, before[1]),
        )
    k, v = (_by_head(states, keys) for states in (key, value))
    if before[0] is not None and before[1] is not None:
        k = torch.cat([before[0].expand(len(k), -1, -1, -1), k], 2)
        v = torch.cat([before[1].expand(len(v), -1, -1, -1), v], 2)
    return _by_head(query, queries), k, v


def _by_head(states: Tensor, places: _Places) -> Tensor:
    """Packed states [N, heads, D] as a batch of trees [B, heads, L, D], gathered and permuted in one copy."""
    heads, dim = states.shape[1:]
    picked = states.reshape(-1, dim).index_select(0, places.gather(heads))
    return picked.view(places.rows.batch, heads, places.rows.length, dim)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, places: _Places, fused: bool) -> Tensor:
    """Grouped-query attention by two batched matrix products; q [B, H, L, D], k and v [B, G, K, D].

    The mask is [B, L, K]. Returns [n, H * D] for the rows that are no padding.
    """
    batch, heads, length, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    repeats = heads // groups
    q = q.view(batch * groups, repeats * length, dim)
    scores = torch.bmm(q, k.reshape(batch * groups, keys, dim).transpose(1, 2))
    if fused:
        weights = kernels.masked_softmax(scores.view(batch, heads, length, keys), mask).view_as(scores)
    else:
        scores.view(batch, groups, repeats, length, keys).add_(mask[:, None, None])
        weights = scores.softmax(-1)
    mixed = torch.bmm(weights, v.reshape(batch * groups, keys, dim))
    return mixed.view(-1, dim).index_select(0, places.valid(heads)).view(-1, heads * dim)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, places: _Places) -> Tensor:
    """The same through the fused kernel, for long sequences."""
    batch, heads, length, dim = q.shape
    grouped = heads > k.shape[1]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=1.0, enable_gqa=grouped)
    return mixed.transpose(1, 2).reshape(batch * length, heads * dim).index_select(0, places.rows.valid)
