"""The preflight: what a run will search, need and take, what it settles by that, and if it can succeed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from compressor import device, models
from compressor.device import GIB, Machine
from compressor.engines.base import MemoryEstimate
from compressor.engines.memory import served_memory, shipped_weight_bytes
from compressor.errors import InfeasibleError, UnfitMachineError
from compressor.models import ModelSource
from compressor.pipeline.needs import MOST_TEXT, Capacity, Choices, Estimate, Need
from compressor.profile import Profile, load_profiles
from compressor.request import RunRequest
from compressor.space import WIDTH_MULTIPLE, ModelShape, SearchSpace
from compressor.supernet.config import LOSSLESS_BITS, check_rank

VLLM_WIDTH_MULTIPLE = 128
"""Of an MLP's width: what Marlin takes as a matrix's inputs, and CUTLASS's INT8 and FP8 as well."""
ADAPTER_RANK = 16
"""Of the adapters that are tuned where all weights don't fit and nobody named a rank."""
RACING_SECONDS = 10.0
"""From so long a scoring on, a GPU's candidates are raced on tasks: a look costs a pass or two."""
EXPORT_BYTES_PER_PARAMETER = 6
"""Disk of base and super-network folders in bf16 and of the block-quantized exports."""
FOLDERS_BYTES_PER_PARAMETER = 6
"""The same where nothing is exported: of the folders and of the package that is scored."""
TUNED_BYTES_PER_PARAMETER = 4
"""Disk of the super-network again, tuned for the winner, and of its export."""
SHOWN_SHARE = 0.94
"""Of a GPU's sold memory, what its driver leaves."""
PEAK_SHARE = 0.8
"""Of a GPU's advertised matrix operations, what a large product reaches (an H200: 788 of 989 TFLOP/s)."""
UNKNOWN_FLOPS, UNKNOWN_BANDWIDTH = 100e12, 500e9
"""Of a GPU whose profile doesn't say."""
CPU_BANDWIDTH = 20e9

WORK = {
    "load": "loading the model",
    "text": "writing text",
    "ranking": "ranking neurons and layers",
    "tuning": "fine-tuning",
    "export": "exporting",
    "references": "measuring the unpruned model",
    "scoring": "scoring sub-networks",
    "measuring": "measuring sub-networks",
    "artefact": "scoring what ships",
    "winner": "tuning the winner",
    "packaging": "packaging",
}
"""Every stage in words."""
SPARING = {
    "text": "lower --text-sequences or --sequence-length",
    "tuning": "lower --tuning-batch or --sequence-length",
    "winner": "lower --tuning-batch or --sequence-length",
    "measuring": "lower --memory-budget or the profile's concurrency",
    "artefact": "lower the profile's concurrency",
}
"""What makes a stage smaller, where something does."""


@dataclass(frozen=True)
class Plan:
    """What a run is about to do. Bytes are exact for the model; times and memory are estimates.

    ``request`` is what was asked with what the plan settled; ``choices`` what it settled by.
    """

    request: RunRequest
    source: ModelSource
    shape: ModelShape
    space: SearchSpace
    capacity: Capacity
    choices: Choices
    stages: dict[str, Need]
    full_weight_bytes: int
    full_memory: MemoryEstimate
    smallest_memory: MemoryEstimate
    disk_bytes: int
    warnings: tuple[str, ...]

    @property
    def evaluations(self) -> int:
        return self.request.effort.evaluations

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds of what a run shows as its stages."""
        of = {name: need.seconds for name, need in self.stages.items()}
        shown = {
            "text": of["load"] + of["text"],
            "supernet": of["ranking"] + of["tuning"],
            "export": of.get("export", 0.0),
            "references": of["references"],
            "search": of["scoring"] + of["measuring"],
            "winner": of.get("winner", 0.0),
            "package": of["artefact"] + of["packaging"],
        }
        return {name: seconds for name, seconds in shown.items() if seconds}

    @property
    def peak_memory_bytes(self) -> int:
        """Of the GPU where one computes, else of the host; without references, which may be left out."""
        needs = [need for name, need in self.stages.items() if name != "references"]
        return max(need.gpu_bytes if self.capacity.on_gpu else need.host_bytes for need in needs)

    @property
    def total_seconds(self) -> float:
        return sum(need.seconds for need in self.stages.values())

    def summary(self) -> str:
        """What was settled, in a line."""
        rank = self.choices.lora_rank
        tuned = f"adapters of rank {rank}" if rank else "all weights"
        place = "of the GPU's memory" if self.capacity.on_gpu else "of memory"
        where, room = self.peak_memory_bytes, self.capacity.gpu_bytes or self.capacity.host_bytes
        return (
            f"the plan: tune {tuned}, evaluate {self.evaluations} sub-networks, about "
            f"{self.total_seconds / 3600:.1f} h, at most {where / GIB:.1f} of {room / GIB:.1f} GiB {place} "
            "(`--dry-run` shows every stage)"
        )


def make_plan(request: RunRequest, machine: Machine, parent: Path = Path()) -> Plan:
    """Check that the run can succeed on this machine, settle what was left open, estimate what it takes.

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
    smallest = served_memory(shape, space.smallest, profile)
    check_memory_budget(profile, smallest)
    estimate = settled(request, shape, space, capacity_of(profile, machine))
    check_fits(estimate)
    disk = disk_bytes(estimate)
    check_disk(parent, disk)
    choices = estimate.choices
    changed = {"lora_rank": choices.lora_rank, **({"racing": True} if choices.racing else {})}
    return Plan(
        request=request.model_copy(update=changed),
        source=source,
        shape=shape,
        space=space,
        capacity=estimate.capacity,
        choices=choices,
        stages=estimate.stages(),
        full_weight_bytes=shipped_weight_bytes(shape, space.full, profile.numerics, profile.engine),
        full_memory=served_memory(shape, space.full, profile),
        smallest_memory=smallest,
        disk_bytes=disk,
        warnings=tuple(plan_warnings(estimate, machine)),
    )


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
        width_multiple=VLLM_WIDTH_MULTIPLE if profile.engine == "vllm" else WIDTH_MULTIPLE,
    )


def learns_rounded(request: RunRequest, space: SearchSpace) -> bool:
    """Whether sub-networks are tuned with weights rounded to their bits: not beside adapters."""
    return min(*space.bits, *space.outer_bits) < LOSSLESS_BITS and not request.lora_rank


def capacity_of(profile: Profile, machine: Machine) -> Capacity:
    """The machine as the plan counts it: a GPU that is here is measured, the profile tells of another."""
    if not machine.gpus:
        return Capacity(matrix_flops(machine, profile), CPU_BANDWIDTH, machine.memory_bytes)
    bandwidth = 1e9 * (profile.device.memory_bandwidth_gb_s or UNKNOWN_BANDWIDTH / 1e9)
    gpu = machine.gpus[0].memory_bytes
    return Capacity(matrix_flops(machine, profile), bandwidth, machine.memory_bytes, gpu)


def settled(request: RunRequest, shape: ModelShape, space: SearchSpace, capacity: Capacity) -> Estimate:
    """The estimate with the choices that fit: all weights before adapters, large batches before small ones.

    Where nothing fits it has the smallest. Raises ``InputError`` for a rank that does not fit the model.
    """
    estimate = Estimate(request, shape, space, capacity, Choices())
    tried = list(_tunings(request, shape))
    fitting = (c for c in tried if _fits(replace(estimate, choices=c), "tuning"))
    estimate = replace(estimate, choices=next(fitting, tried[-1]))
    batches = [MOST_TEXT >> halved for halved in range(MOST_TEXT.bit_length())]
    written = [replace(estimate.choices, text_batch=batch) for batch in batches]
    estimate = replace(
        estimate,
        choices=next((c for c in written if _fits(replace(estimate, choices=c), "text")), written[-1]),
    )
    beside = not capacity.on_gpu or request.profile.engine != "vllm" or estimate.both() <= capacity.gpu_bytes
    return replace(estimate, choices=replace(estimate.choices, keeps_both=beside, racing=_races(estimate)))


def _tunings(request: RunRequest, shape: ModelShape) -> Iterator[Choices]:
    batch = request.effort.tuning_batch
    parts = [count for count in range(1, batch + 1) if batch % count == 0]
    for rank in (0, ADAPTER_RANK) if request.lora_rank is None else (request.lora_rank,):
        if rank and request.lora_rank:
            check_rank(shape, rank)
        if rank < shape.hidden_size:
            yield from (Choices(lora_rank=rank, accumulation=part) for part in parts)


def _races(estimate: Estimate) -> bool:
    request = estimate.request
    if request.racing is not None or request.scores_agreement:
        return request.races
    return request.races or (estimate.capacity.on_gpu and estimate.candidate_seconds >= RACING_SECONDS)


def _fits(estimate: Estimate, stage: str = "") -> bool:
    stages = estimate.stages()
    needs = [stages[stage]] if stage else [need for name, need in stages.items() if name != "references"]
    capacity = estimate.capacity
    return all(
        need.gpu_bytes <= capacity.gpu_bytes and need.host_bytes <= capacity.host_bytes for need in needs
    )


def check_fits(estimate: Estimate) -> None:
    """Raise ``UnfitMachineError`` for the first stage that the machine has too little memory for, with the
    smallest device that would do."""
    capacity = estimate.capacity
    for name, need in estimate.stages().items():
        if name == "references":
            continue
        sparing = f", or {SPARING[name]}" if name in SPARING else ""
        if need.gpu_bytes > capacity.gpu_bytes:
            raise UnfitMachineError(
                f"{_work(estimate, name)} takes {need.gpu_bytes / GIB:.1f} GiB of the GPU's memory, of which "
                f"there are {capacity.gpu_bytes / GIB:.1f}: {_larger(estimate)}{sparing}"
            )
        if need.host_bytes > capacity.host_bytes:
            raise UnfitMachineError(
                f"{_work(estimate, name)} takes {need.host_bytes / GIB:.1f} GiB of memory, of which there "
                f"are {capacity.host_bytes / GIB:.1f}: use a machine with at least "
                f"{np.ceil(need.host_bytes / GIB):.0f} GiB{sparing}"
            )


def _work(estimate: Estimate, stage: str) -> str:
    if stage not in ("tuning", "winner"):
        return WORK[stage]
    rank = estimate.choices.lora_rank
    return f"{WORK[stage]} ({f'adapters of rank {rank}' if rank else 'all weights'})"


def _larger(estimate: Estimate) -> str:
    """The smallest GPU among the profiles that the run would fit, in words; adapters where they would do."""
    asked = estimate.request.lora_rank
    if asked == 0:
        adapted = estimate.request.model_copy(update={"lora_rank": None})
        if _fits(settled(adapted, estimate.shape, estimate.space, estimate.capacity)):
            return "leave --lora-rank out to tune adapters instead"
    known = sorted((p for p in load_profiles() if p.device.kind == "cuda"), key=lambda p: p.device.memory_gib)
    for profile in known:
        size = int(profile.device.memory_gib * GIB * SHOWN_SHARE)
        host = max(estimate.capacity.host_bytes, size)
        capacity = replace(estimate.capacity, gpu_bytes=size, host_bytes=host)
        if _fits(settled(estimate.request, estimate.shape, estimate.space, capacity)):
            return (
                f"the smallest that would do has {profile.device.memory_gib:g} GiB (profile {profile.name})"
            )
    return f"no GPU of the profiles would do, the largest has {known[-1].device.memory_gib:g} GiB"


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


def disk_bytes(estimate: Estimate) -> int:
    """Disk that the run's folder takes at its fullest, with what the unpruned model thought of the text."""
    request, parameters = estimate.request, estimate.parameters
    exports = request.profile.engine == "onnxruntime"
    tuned = TUNED_BYTES_PER_PARAMETER if request.effort.winner_minutes else 0
    each = (EXPORT_BYTES_PER_PARAMETER if exports else FOLDERS_BYTES_PER_PARAMETER) + tuned
    return parameters * each + 2 * estimate.states_bytes


def check_disk(parent: Path, needed: int) -> None:
    """Raise ``UnfitMachineError`` if the disk under ``parent`` is too small for the run."""
    existing = next(p for p in (parent.absolute(), *parent.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UnfitMachineError(
            f"the run needs about {needed / 1e9:.1f} GB of disk and {existing} has {free / 1e9:.1f} GB free: "
            "free some, or put the run on another disk with --run"
        )


def plan_warnings(estimate: Estimate, machine: Machine) -> list[str]:
    """What the user should know before the run begins."""
    request, choices = estimate.request, estimate.choices
    profile, found = request.profile, []
    full = served_memory(estimate.shape, estimate.space.full, profile)
    if full.total <= profile.budgets.memory_bytes:
        found.append(
            "the unpruned model meets the memory budget already: the search looks for a smaller or faster one"
        )
    if profile.device.kind == "cpu" and (gpu := device.unknown_gpu(machine)):
        found.append(
            f"no profile is for this machine's {gpu}: it computes, but what is served is the CPU's. "
            "To serve on it, copy the nearest profile (`compress profiles show l4-24g`), put its name and "
            "memory there, and pass the file with --profile"
        )
    if request.lora_rank is None and choices.lora_rank:
        found.append(
            f"all weights don't fit to be tuned here: adapters of rank {choices.lora_rank} are "
            "(--lora-rank sets another)"
        )
    if choices.racing and not request.races:
        found.append(
            "scoring stops early for what is surely dominated, which is counted to spare a quarter of it; "
            "--no-racing scores everything in full"
        )
    most = max(need.host_bytes for need in estimate.stages().values())
    if most > machine.memory_available_bytes:
        found.append(
            f"the run wants about {most / GIB:.1f} GiB of memory and "
            f"{machine.memory_available_bytes / GIB:.1f} GiB are free: close other programs"
        )
    references = estimate.references().gpu_bytes
    if references > estimate.capacity.gpu_bytes > 0:
        found.append(
            f"the unpruned model takes {references / GIB:.1f} GiB to be served: numerics of it that don't "
            "fit this GPU are left out of the comparison"
        )
    return found


def matrix_flops(machine: Machine, profile: Profile, size: int = 768) -> float:
    """Matrix operations/s of this machine's GPU, or of its cores in fp32, by a trial of milliseconds; of a
    GPU that only the profile knows, by what is advertised."""
    if machine.gpus:
        import torch

        if torch.cuda.is_available():
            from compressor.compute import gpu_matmul_flops

            return gpu_matmul_flops()
        advertised = profile.device.matrix_tflops
        return PEAK_SHARE * 1e12 * advertised if advertised else UNKNOWN_FLOPS
    a = np.ones((size, size), dtype=np.float32)
    a @ a
    began = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2.0 * size**3 / (time.perf_counter() - began)


def _round_up(value: float) -> float:
    return float(np.ceil(value * 1000) / 1000)
