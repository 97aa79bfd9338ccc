"""The preflight: what a run will search, need and take, and whether it can succeed at all."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compressor import device, models
from compressor.device import Machine
from compressor.engines.base import MemoryEstimate
from compressor.engines.memory import served_memory, shipped_weight_bytes
from compressor.errors import InfeasibleError, UnfitMachineError
from compressor.models import ModelSource
from compressor.profile import Profile
from compressor.request import RunRequest
from compressor.space import ModelShape, SearchSpace, parameter_count
from compressor.supernet.config import LOSSLESS_BITS, adapter_parameters, check_rank

TRAINING_BYTES_PER_PARAMETER = 18
"""bf16 weights, gradients and teacher; fp32 master weights and two Adam moments."""
ROUNDING_BYTES_PER_PARAMETER = 4
"""The unrounded weights that are kept while a step learns with rounded ones."""
FROZEN_BYTES_PER_PARAMETER = 4
"""Weights beside which adapters are tuned, in fp32 where the machine multiplies that fastest."""
EXPORT_BYTES_PER_PARAMETER = 6
"""Disk of base and super-network folders in bf16 and of the block-quantized exports."""
TUNED_BYTES_PER_PARAMETER = 4
"""Disk of the super-network again, tuned for the winner, and of its export."""
PEAK_SHARE = {"sampling": 0.1, "training": 0.4, "scoring": 0.5}
"""Share of the machine's matrix peak that each kind of work reaches."""


@dataclass(frozen=True)
class Plan:
    """What a run is about to do. Bytes are exact for the model; times and memory are estimates."""

    source: ModelSource
    shape: ModelShape
    space: SearchSpace
    evaluations: int
    full_weight_bytes: int
    full_memory: MemoryEstimate
    smallest_memory: MemoryEstimate
    stage_seconds: dict[str, float]
    peak_memory_bytes: int
    disk_bytes: int
    warnings: tuple[str, ...]

    @property
    def total_seconds(self) -> float:
        return sum(self.stage_seconds.values())


def make_plan(request: RunRequest, machine: Machine, parent: Path = Path()) -> Plan:
    """Check that the run can succeed on this machine and estimate what it takes.

    Loads no weights. Raises ``InputError`` for a model that cannot be used, ``UnfitMachineError`` for
    a missing device, memory or disk, and ``InfeasibleError`` where no sub-network meets the memory
    budget.
    """
    profile = request.profile
    if not request.cluster:
        device.require(profile, machine)
    source = models.resolve(request.model)
    shape = models.read_shape(source)
    space = profile_space(shape, profile)
    full = served_memory(shape, space.full, profile)
    smallest = served_memory(shape, space.smallest, profile)
    check_memory_budget(profile, smallest)
    peak = tuning_memory_bytes(request, shape)
    tuned = TUNED_BYTES_PER_PARAMETER if request.effort.winner_minutes else 0
    disk = parameter_count(shape, space.full) * (EXPORT_BYTES_PER_PARAMETER + tuned)
    check_disk(parent, disk)
    return Plan(
        source=source,
        shape=shape,
        space=space,
        evaluations=request.effort.evaluations,
        full_weight_bytes=shipped_weight_bytes(shape, space.full, profile.numerics, profile.engine),
        full_memory=full,
        smallest_memory=smallest,
        stage_seconds=estimate_seconds(request, shape, space, matrix_flops(machine)),
        peak_memory_bytes=peak,
        disk_bytes=disk,
        warnings=tuple(plan_warnings(profile, machine, full, peak)),
    )


def tuning_memory_bytes(request: RunRequest, shape: ModelShape) -> int:
    """Memory that the fine-tuning takes: of all weights, or of adapters beside frozen weights.

    Adapters are so few that what is kept for each token counts: a state a layer, as gradients are
    checkpointed, and the teacher's last state of the training text. Raises ``InputError`` for a rank that
    does not fit the model.
    """
    space = profile_space(shape, request.profile)
    parameters = parameter_count(shape, space.full)
    if not request.lora_rank:
        rounding = ROUNDING_BYTES_PER_PARAMETER if learns_rounded(request, space) else 0
        return parameters * (TRAINING_BYTES_PER_PARAMETER + rounding)
    check_rank(shape, request.lora_rank)
    effort = request.effort
    learnt = effort.text_sequences if request.data_free else effort.tuning_steps * effort.tuning_batch
    sequences = shape.num_layers * effort.tuning_batch + (learnt if request.keeps_teacher else 0)
    states = sequences * effort.sequence_length * shape.hidden_size * 4
    adapters = adapter_parameters(shape, request.lora_rank)
    return parameters * FROZEN_BYTES_PER_PARAMETER + adapters * TRAINING_BYTES_PER_PARAMETER + states


def learns_rounded(request: RunRequest, space: SearchSpace) -> bool:
    """Whether sub-networks are tuned with weights rounded to their bits: not beside adapters."""
    return min(*space.bits, *space.outer_bits) < LOSSLESS_BITS and not request.lora_rank


def profile_space(shape: ModelShape, profile: Profile, drop_order: tuple[int, ...] = ()) -> SearchSpace:
    """The profile's search space for a model of this shape."""
    fractions = profile.space
    return SearchSpace.from_fractions(
        shape,
        fractions.depth_fractions,
        fractions.width_fractions,
        drop_order,
        profile.layer_bits,
        profile.outer_bits,
    )


def check_memory_budget(profile: Profile, smallest: MemoryEstimate) -> None:
    """Raise ``InfeasibleError`` if even the smallest sub-network needs more than the budget."""
    limit = profile.budgets.memory_bytes
    if smallest.total <= limit:
        return
    excess = (smallest.total - limit) / 2**20
    raise InfeasibleError(
        f"no sub-network meets the memory budget of {profile.budgets.memory_gib:g} GiB: the smallest of the "
        f"search space needs {smallest.total / 2**30:.3f} GiB, {excess:.1f} MiB more. Raise --memory-budget "
        f"to at least {_round_up(smallest.total / 2**30)}, or give the profile smaller depth_fractions or "
        "width_fractions"
    )


def check_disk(parent: Path, needed: int) -> None:
    """Raise ``UnfitMachineError`` if the disk under ``parent`` is too small for the run."""
    existing = next(p for p in (parent.absolute(), *parent.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UnfitMachineError(
            f"the run needs about {needed / 1e9:.1f} GB of disk and {existing} has {free / 1e9:.1f} GB free: "
            "free some, or put the run on another disk with --run"
        )


def plan_warnings(profile: Profile, machine: Machine, full: MemoryEstimate, peak: int) -> list[str]:
    found = []
    if full.total <= profile.budgets.memory_bytes:
        found.append(
            "the unpruned model meets the memory budget already: the search looks for a smaller or faster one"
        )
    on_gpu = bool(machine.gpus)
    room = machine.gpus[0].memory_bytes if on_gpu else machine.memory_available_bytes
    if peak > room:
        remedy = "tune adapters with --lora-rank 16" if on_gpu else "close other programs"
        found.append(
            f"fine-tuning wants about {peak / 2**30:.1f} GiB of memory and {room / 2**30:.1f} GiB are "
            f"{'on the GPU' if on_gpu else 'free'}: {remedy}"
        )
    return found


def estimate_seconds(
    request: RunRequest, shape: ModelShape, space: SearchSpace, flops: float
) -> dict[str, float]:
    """Expected seconds of each stage on a machine that multiplies matrices at ``flops`` operations/s."""
    effort = request.effort
    forward = 2.0 * parameter_count(shape, space.full)
    sampled = (effort.text_sequences + effort.score_sequences) * effort.sequence_length
    step = 4 * effort.sequence_length * 4 * forward
    scored = effort.score_sequences // 2 * effort.sequence_length
    export = 3 * (5 + forward / 2 / 10e6)
    tuning = effort.tuning_steps * step / (flops * PEAK_SHARE["training"])
    return {
        "text": sampled * forward / (flops * PEAK_SHARE["sampling"]),
        "supernet": min(effort.tuning_minutes * 60, tuning),
        "export": export,
        "search": effort.evaluations
        * (1.0 + effort.bench_seconds + scored * forward / (flops * PEAK_SHARE["scoring"])),
        "winner": min(effort.winner_minutes * 60, tuning),
        "package": 15 + export / 3,
    }


def matrix_flops(machine: Machine, size: int = 768) -> float:
    """Matrix operations/s of this machine's GPU, or of its cores in fp32, by a trial of milliseconds."""
    if machine.gpus:
        from compressor.compute import gpu_matmul_flops

        return gpu_matmul_flops()
    a = np.ones((size, size), dtype=np.float32)
    a @ a
    began = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2.0 * size**3 / (time.perf_counter() - began)


def _round_up(value: float) -> float:
    return float(np.ceil(value * 1000) / 1000)
