"""How a run rounds weights: by its own text, as tunings see it, as a tuning of one sub-network leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compressor import models
from compressor.engines.calibrate import calibrated
from compressor.engines.memory import served_memory
from compressor.engines.quantize import Grid, Quantized, pack
from compressor.engines.rounding import EMBED, HEAD, Rounding, layer_linears
from compressor.events import StageProgress
from compressor.pipeline.base import compute_device, compute_dtype
from compressor.pipeline.context import Context
from compressor.pipeline.plan import Plan
from compressor.space import ZERO_POINTS, SearchSpace, SubNetwork
from compressor.supernet.served import Served

STAGE = "rounding"


def lossy_bits(space: SearchSpace) -> set[int]:
    """Bits of the space in which weights lose something by being rounded to the nearest."""
    return {*space.bits, *space.outer_bits} & ZERO_POINTS


def round_folder(context: Context, folder: Path, space: SearchSpace, text: Tensor, prefixes: bool) -> None:
    """Round a model's folder for every number of bits that the space has, on that text, and keep it there."""
    model = models.load(models.resolve(str(folder)), compute_dtype(context)).model.to(compute_device())

    def told(done: int, total: int) -> None:
        context.listener(StageProgress(STAGE, done, total, folder.name))

    calibrated(model, text, space.bits, space.outer_bits, told, prefixes).save(folder)


def served(context: Context, plan: Plan) -> Served:
    """What a tuning is told of how its sub-networks are served; no rounding yet."""
    profile = context.request.profile
    return Served(lambda subnet: float(served_memory(plan.shape, subnet, profile).total))


def served_rounded(
    context: Context, plan: Plan, model: PreTrainedModel, rounding: Rounding | None = None
) -> Served:
    """The same with every matrix that may have few bits on the grid that it is rounded to; by default that
    of its nearest values."""
    space, plain = plan.space, served(context, plan)
    known = rounding or Rounding()
    inner, outer = set(space.bits) & ZERO_POINTS, set(space.outer_bits) & ZERO_POINTS
    grids = {
        name: known.of(name, linear.weight.detach(), bits).grid
        for bits in inner
        for index in range(len(model.model.layers))
        for name, linear in layer_linears(model, index)
    }
    return Served(plain.size, grids or None, {bits: outer_weights(model, known, bits) for bits in outer})


def outer_weights(model: PreTrainedModel, rounding: Rounding, bits: int) -> tuple[Tensor, Tensor]:
    """Embeddings and head in so many bits: one tensor where they are tied."""
    embed: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    rounded = rounding.values(EMBED, embed.weight.detach(), bits)
    if head.weight is embed.weight:
        return rounded, rounded
    return rounded, rounding.values(HEAD, head.weight.detach(), bits)


def start_rounded(model: PreTrainedModel, rounding: Rounding, subnet: SubNetwork) -> None:
    """Put what the sub-network's matrices of few bits are rounded to in their place: a tuning begins there.

    Begun at unrounded weights, it soon undoes what rounding took care for: many of those lie beside the
    border to another value.
    """
    for index, bits in zip(subnet.layers, subnet.bits, strict=True):
        for name, linear in layer_linears(model, index) if bits in ZERO_POINTS else ():
            linear.weight.data = rounding.values(name, linear.weight.detach(), bits)


def learnt_rounding(
    model: PreTrainedModel, subnet: SubNetwork, rounding: Rounding, served: Served
) -> Rounding:
    """How a tuning of one sub-network left its matrices rounded; the others as before. The model, all of
    whose layers are active, holds what they are rounded to afterwards."""
    matrices = dict(rounding.items())
    for position, (index, bits) in enumerate(zip(subnet.layers, subnet.bits, strict=True)):
        for name, linear in layer_linears(model, index) if bits in ZERO_POINTS else ():
            rows, columns = _kept(name, linear.weight.shape, subnet.widths[position])
            part = linear.weight.data[:rows, :columns]
            grid = served.grid(name, part)
            assert isinstance(grid, Grid)
            whole = rounding.of(name, linear.weight.detach(), bits)
            matrices[name, bits] = _replaced(whole, grid, grid.integers(part))
            part.copy_(grid.rounded(part))
    return Rounding(matrices)


def _kept(name: str, shape: Sequence[int], width: int) -> tuple[int, int]:
    rows, columns = shape
    if name.endswith("down_proj"):
        return rows, width
    return (width if name.endswith(("gate_proj", "up_proj")) else rows), columns


def _replaced(whole: Quantized, grid: Grid, integers: Tensor) -> Quantized:
    """A matrix with its first rows and blocks as given."""
    rows, blocks = grid.scales.shape
    old, values = whole.grid, whole.unpacked()
    scales, zeros = old.scales.clone(), old.zeros.clone()
    scales[:rows, :blocks], zeros[:rows, :blocks] = grid.scales, grid.zeros
    values[:rows, :blocks] = integers
    return pack(values, Grid(scales, zeros, whole.bits))
