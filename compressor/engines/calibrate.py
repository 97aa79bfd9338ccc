"""Rounds a whole model on text, layer by layer: each layer's inputs are those that the rounded ones before
it give, so that it makes up for them as well.

Beside the model in memory: one layer's second moments and the hidden states of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.engines.gptq import output_error, round_matrix
from compressor.engines.quantize import Quantized, quantize
from compressor.engines.rounding import EMBED, HEAD, Rounding, layer_linears
from compressor.errors import InputError
from compressor.space import ZERO_POINTS

MOST_TOKENS = 8192
"""Tokens of calibration text that are read; more change little and take longer."""
LEAST_TOKENS = 512
BATCH_TOKENS = 2048
DOUBTFUL = 1.5
"""How many times the error on the text it was rounded by a matrix may have on other text before it is asked
whether the nearest values do better there."""
HELD_OUT = 4
"""Every so many-th batch is kept from rounding, to tell whether errors passed on help on other text."""

_Progress = Callable[[int, int], None]
_SHARING = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Linears that read the inputs of another."""


@dataclass
class _Moments:
    """Second moments [K, K] of a linear's inputs on text to round by, and on text held out."""

    learnt: Tensor | None = None
    held: Tensor | None = None

    def add(self, inputs: Tensor, held: bool) -> None:
        rows = inputs.detach().flatten(0, -2).float()
        if held:
            self.held = _added(self.held, rows)
        else:
            self.learnt = _added(self.learnt, rows)


def _added(moments: Tensor | None, rows: Tensor) -> Tensor:
    return rows.t() @ rows if moments is None else moments.addmm_(rows.t(), rows)


@dataclass
class _Walk:
    """Hidden states of the text on their way through the layers."""

    states: list[Tensor]
    arguments: list[dict[str, Any]]
    """What each layer is called with beside them, for one batch."""
    moments: dict[str, _Moments] = field(default_factory=dict)

    def through(
        self, layer: nn.Module, index: int, noted: Mapping[str, nn.Module] | None = None
    ) -> list[Tensor]:
        """The states after a layer; inputs of the modules ``noted`` go into the moments."""
        after = []
        for number, hidden in enumerate(self.states):
            held = self._held(number)
            hooks = [
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name, held=held: self.moments[name].add(inputs[0], held)
                )
                for name, module in (noted or {}).items()
            ]
            try:
                found = layer(hidden, **self._fitting(index, len(hidden)))
            finally:
                for hook in hooks:
                    hook.remove()
            after.append(found[0] if isinstance(found, tuple) else found)
        return after

    def _held(self, number: int) -> bool:
        return len(self.states) >= HELD_OUT and number % HELD_OUT == HELD_OUT - 1

    def _fitting(self, index: int, rows: int) -> dict[str, Any]:
        """A layer's arguments for a batch that may have fewer rows than the one that they are of."""
        return {
            name: value[:rows] if isinstance(value, Tensor) and value.dim() == 4 else value
            for name, value in self.arguments[index].items()
        }


@torch.no_grad()
def calibrated(
    model: PreTrainedModel,
    ids: Tensor,
    bits: Collection[int] = (4,),
    outer_bits: Collection[int] | None = None,
    progress: _Progress | None = None,
    prefixes: bool = False,
) -> Rounding:
    """The rounding of a model's matrices in those bits that lose anything by it (``ZERO_POINTS``).

    ``ids`` [sequences, length] is text like what the model will read; ``outer_bits`` are those of embeddings
    and head, ``bits`` unless given. ``prefixes``: down projections will be cut to their first columns. The
    model is given back as it was. Raises ``InputError`` for text too short to tell anything.
    """
    inner = sorted(set(bits) & ZERO_POINTS)
    outer = sorted(set(bits if outer_bits is None else outer_bits) & ZERO_POINTS)
    if not inner and not outer:
        return Rounding()
    rows = _enough(ids)
    found: dict[tuple[str, int], Quantized] = {}
    kept: list[tuple[nn.Linear, Tensor]] = []
    layers: Any = model.model.layers
    try:
        walk = _begin(model, rows)
        for index, layer in enumerate(layers):
            matrices = _round_layer(model, walk, index, inner, prefixes)
            found |= matrices
            for name, linear in layer_linears(model, index):
                kept.append((linear, linear.weight.data))
                if inner:
                    values = matrices[name, inner[0]].values(linear.weight.shape[1])
                    linear.weight.data = values.to(linear.weight)
            walk.states = walk.through(layer, index)
            if progress is not None:
                progress(index + 1, len(layers) + 1)
        found |= _round_outer(model, walk, outer)
        if progress is not None:
            progress(len(layers) + 1, len(layers) + 1)
    finally:
        for linear, weight in kept:
            linear.weight.data = weight
    return Rounding(found)


def _enough(ids: Tensor) -> Tensor:
    if ids.numel() < LEAST_TOKENS:
        raise InputError(
            f"{ids.numel()} tokens of text are too few to round weights by: give at least {LEAST_TOKENS} "
            "(more --text-sequences, or more --train-data)"
        )
    return ids[: max(1, MOST_TOKENS // ids.shape[1])]


def _begin(model: PreTrainedModel, rows: Tensor) -> _Walk:
    """The embedded text, and what the model calls each of its layers with."""
    arguments: list[dict[str, Any]] = []
    layers: Any = model.model.layers

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        told = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        arguments.append({**told, "use_cache": False} if "use_cache" in told else told)

    batches = torch.split(rows.to(model.device), max(1, BATCH_TOKENS // rows.shape[1]))
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model.model(batches[0], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    embed: Any = model.get_input_embeddings()
    scale = getattr(model.model, "embed_scale", None)
    return _Walk([embed(batch) if scale is None else embed(batch) * scale for batch in batches], arguments)


def _round_layer(
    model: PreTrainedModel, walk: _Walk, index: int, bits: list[int], prefixes: bool
) -> dict[tuple[str, int], Quantized]:
    linears = dict(layer_linears(model, index))
    source = {name: _read_by(name) for name in linears}
    noted = {name: linears[name] for name in dict.fromkeys(source.values())}
    walk.moments = {name: _Moments() for name in noted}
    layers: Any = model.model.layers
    walk.through(layers[index], index, noted)
    found = {}
    for name, linear in linears.items():
        for each in bits:
            refine = not (prefixes and name.endswith("down_proj"))
            found[name, each] = _best(linear.weight.data, walk.moments[source[name]], each, refine)
    walk.moments = {}
    return found


def _round_outer(model: PreTrainedModel, walk: _Walk, bits: list[int]) -> dict[tuple[str, int], Quantized]:
    """Embeddings and head: the head by its inputs; embeddings that are not tied to it to the nearest."""
    embed: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head.weight is embed.weight
    moments = _Moments()
    for number, hidden in enumerate(walk.states):
        moments.add(model.model.norm(hidden), walk._held(number))
    found = {}
    for each in bits:
        found[EMBED if tied else HEAD, each] = _best(head.weight.data, moments, each, refine=True)
        if not tied:
            found[EMBED, each] = quantize(embed.weight.data, each)
    return found


def _best(weight: Tensor, moments: _Moments, bits: int, refine: bool) -> Quantized:
    """Rounded by its inputs, unless rounding to the nearest does better on inputs that were held out."""
    assert moments.learnt is not None
    parts = [round_matrix(rows, moments.learnt, bits, refine) for rows in torch.split(weight, ROWS_AT_ONCE)]
    passed = Quantized.stacked(parts)
    if moments.held is None:
        return passed
    wide, columns = weight.float(), weight.shape[1]
    values = passed.values(columns)
    held = output_error(wide, values, moments.held)
    if held <= DOUBTFUL * output_error(wide, values, moments.learnt):
        return passed
    nearest = quantize(weight, bits)
    return passed if held <= output_error(wide, nearest.values(columns), moments.held) else nearest


ROWS_AT_ONCE = 8192
"""Rows of a matrix that are rounded together: errors pass along rows alone."""


def _read_by(name: str) -> str:
    stem, _, own = name.rpartition(".")
    return f"{stem}.{_SHARING.get(own, own)}"
