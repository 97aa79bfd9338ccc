"""What every stage of a run takes, computed from shapes alone: memory on the GPU and the host, and time.

Bytes of weights and caches are exact; activations count what a layer keeps. Times are a machine's peak
times the share of it that each kind of work reaches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from compressor.engines.memory import required_memory_bytes, served_memory
from compressor.evaluation.schedule import wave_tokens
from compressor.evaluation.shared_layers import AHEAD, MOST_BYTES
from compressor.evaluation.tasksize import TaskSize, sizes
from compressor.profile import EngineName
from compressor.request import RunRequest
from compressor.space import ModelShape, Numerics, SearchSpace, SubNetwork, parameter_count
from compressor.supernet.config import LOSSLESS_BITS, adapter_parameters

TRAINED_BYTES = 18
"""A trained parameter's: weight, gradient and a step's scratch in bf16; fp32 master and two Adam moments."""
ROUNDING_BYTES = 4
"""The unrounded weights that are kept while a step learns with rounded ones, and their gradients."""
GPU_RESERVE = 1_500_000_000
"""Of a GPU, what a process of PyTorch takes beside tensors: context, workspaces, holes."""
VLLM_RESERVE = 1_200_000_000
"""The same of vLLM, with the graphs of its decoding steps."""
HOST_RESERVE = 1_000_000_000
"""Of the host, what Python with its libraries takes in the processes of a run."""
SHARE = {"sampling": 0.1, "training": 0.4, "scoring": 0.5, "prefill": 0.5}
"""Share of the measured matrix peak that each kind of work reaches."""
BANDWIDTH_SHARE = 0.7
LAUNCH_SECONDS = 2e-4
"""A GPU's layer in PyTorch takes no less, whatever it computes: its kernels are launched one by one."""
DISK_BANDWIDTH = 1e9
PCIE_BANDWIDTH = 12e9
"""Bytes/s of a disk, and between pinned host memory and a GPU, as clouds have them at least."""
ROUND = 8
"""Sub-networks that are scored, then measured, before the GPU changes its owner again."""
RANKED_ROWS, RANKED_LENGTH = 32, 256
"""Sequences that neurons are ranked on; tokens of a row that layers are ranked on."""
MOST_TEXT = 128
"""Sequences written at once, at most."""
BLOCK_TOKENS = {"cpu": 2048, "gpu": 16384}
"""Tokens of one pass of scoring."""
RACING_SPARES = 0.25
"""Part of a candidate's scoring that racing is counted to spare; how much it is depends on the search."""
STARTS = {"onnxruntime": 1.0, "cpu": 6.0, "gpu": 4.0}
"""Seconds to build and load a candidate: a graph, or in vLLM with made-up weights."""
LOAD_SECONDS = 45.0
"""vLLM's imports and first start."""


@dataclass(frozen=True)
class Capacity:
    """A machine as a plan counts it: matrix operations/s, bytes/s of the memory that weights lie in, bytes of
    the host and of one GPU (0: the CPU computes)."""

    flops: float
    bandwidth: float
    host_bytes: int
    gpu_bytes: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.gpu_bytes > 0

    @property
    def element(self) -> int:
        """Bytes of a weight while computing: bf16 on a GPU, fp32 on a CPU that is faster in it."""
        return 2 if self.on_gpu else 4


@dataclass(frozen=True)
class Choices:
    """What a plan settles by what fits. ``lora_rank`` 0 tunes all weights; ``keeps_both``: the super-network
    stays on the GPU while vLLM measures there."""

    lora_rank: int = 0
    accumulation: int = 1
    text_batch: int = MOST_TEXT
    keeps_both: bool = True
    racing: bool = False


@dataclass(frozen=True)
class Need:
    """A stage's: bytes on one GPU and on the host, and seconds."""

    gpu_bytes: int
    host_bytes: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """The needs of one request on one machine, under given choices."""

    request: RunRequest
    shape: ModelShape
    space: SearchSpace
    capacity: Capacity
    choices: Choices

    def stages(self) -> dict[str, Need]:
        """Every stage in the order it runs; export only where there is one."""
        found = {
            "load": self.load(),
            "text": self.text(),
            "ranking": self.ranking(),
            "tuning": self.tuning(self.request.effort.tuning_minutes),
        }
        if self._engine == "onnxruntime":
            found["export"] = self.export()
        found |= {
            "references": self.references(),
            "scoring": self.scoring(),
            "measuring": self.measuring(),
            "artefact": self.artefact(),
        }
        if self.request.effort.winner_minutes:
            found["winner"] = self.tuning(self.request.effort.winner_minutes)
        return {**found, "packaging": self.packaging()}

    @property
    def parameters(self) -> int:
        return parameter_count(self.shape, self.space.full)

    @property
    def weights(self) -> int:
        """Bytes of the whole model where and in what the run computes."""
        return self.parameters * self.capacity.element

    def load(self) -> Need:
        """The model into the run's folder, through the host."""
        size = 2 * self.parameters
        return Need(0, HOST_RESERVE + size, 3 * size / DISK_BANDWIDTH)

    def text(self) -> Need:
        """Text that the whole model writes, ``text_batch`` sequences at once over a cache of their own."""
        effort, batch = self.request.effort, self.choices.text_batch
        cache = batch * effort.sequence_length * self._kept_per_token
        logits = batch * self.shape.vocab_size * (self.capacity.element + 4)
        sequences = effort.text_sequences + effort.score_sequences
        steps = math.ceil(sequences / batch) * effort.sequence_length
        products = batch * self._forward / (self.capacity.flops * SHARE["scoring"])
        reading = self.weights / (self.capacity.bandwidth * BANDWIDTH_SHARE)
        each = max(products, reading) + self._launches
        if not self.capacity.on_gpu:
            each = batch * self._forward / (self.capacity.flops * SHARE["sampling"])
            steps = math.ceil(sequences * effort.sequence_length / batch)
        return self._need(self.weights + cache + logits, 2 * self.states_bytes, steps * each)

    def ranking(self) -> Need:
        """Neurons in one pass over the text, layers in a pass for each that may go, and its trials."""
        length = self.request.effort.sequence_length
        kept = self.shape.num_layers * RANKED_LENGTH * 8 * self.shape.hidden_size * self.capacity.element
        logits = 8 * RANKED_LENGTH * self.shape.vocab_size * (self.capacity.element + 4)
        passing = 8 * length * self._layer_per_token
        drops = self.shape.num_layers - self.space.depths[0]
        tokens = RANKED_ROWS * length + (drops + 1) * self.shape.num_layers / 2 * 8 * RANKED_LENGTH
        seconds = tokens * self._forward / (self.capacity.flops * SHARE["scoring"])
        return self._need(self.weights + kept + logits + passing, 0, seconds)

    def tuning(self, minutes: float) -> Need:
        """All weights, or adapters beside frozen ones; states of the unpruned model stay on the host."""
        effort, shape = self.request.effort, self.shape
        part = max(1, effort.tuning_batch // self.choices.accumulation) * effort.sequence_length
        rank = self.choices.lora_rank
        if rank:
            trained = self.weights + adapter_parameters(shape, rank) * TRAINED_BYTES
            kept = part * (shape.num_layers * shape.hidden_size * self.capacity.element)
            kept += part * (self._layer_per_token + 8 * rank * self.capacity.element)
        else:
            rounding = ROUNDING_BYTES if self.learns_rounded else 0
            trained = self.parameters * (TRAINED_BYTES + rounding)
            kept = part * shape.num_layers * self._layer_per_token
        logits = part * min(shape.vocab_size, 16 * part) * 12
        step = 4 * effort.tuning_batch * effort.sequence_length * self._forward
        full = effort.tuning_steps * step / (self.capacity.flops * SHARE["training"])
        return self._need(trained + kept + logits, self.states_bytes, min(60 * minutes, full))

    @property
    def states_bytes(self) -> int:
        """Of what the unpruned model thought of every token that is learnt, where that is kept."""
        request, effort = self.request, self.request.effort
        if not request.keeps_teacher:
            return 0
        learnt = effort.text_sequences if request.data_free else effort.tuning_steps * effort.tuning_batch
        return learnt * effort.sequence_length * self.shape.hidden_size * self.capacity.element

    @property
    def learns_rounded(self) -> bool:
        """Whether sub-networks are tuned with weights rounded to their bits: not beside adapters."""
        return min(self.space.bits) < LOSSLESS_BITS and not self.choices.lora_rank

    def export(self) -> Need:
        """The super-network and the base model, quantized for ONNX Runtime on the host."""
        return Need(0, HOST_RESERVE + 4 * self.parameters, 3 * (5 + self._forward / 2 / 10e6))

    def references(self) -> Need:
        """The unpruned model: scored in PyTorch, then, that gone, measured and scored as users have it."""
        served = max(self._served("bf16"), self._served("int8")) if self._engine == "vllm" else 0
        here = self._scoring_bytes(self.weights)
        splits = sum(self._split_seconds(split, whole=True) for split in ("search", "report"))
        artefact = self.artefact().seconds
        measured = 3 * (self._start_seconds + 4 * self.request.effort.bench_seconds)
        return self._need(max(here, served), 0, splits + artefact + measured)

    def scoring(self) -> Need:
        """All candidates of the search, in the super-network; racing spares a part."""
        spared = RACING_SPARES if self.choices.racing else 0.0
        copies = len(self.space.bits) if self.space.bits != (8,) else 1
        seconds = self.request.effort.evaluations * self.candidate_seconds * (1 - spared)
        return self._need(self._scoring_bytes(self.weights * copies), 0, seconds)

    @property
    def candidate_seconds(self) -> float:
        """Scoring a sub-network of middling size in full."""
        return self._split_seconds("search", whole=False)

    def measuring(self) -> Need:
        """All candidates in the engine that serves, beside the super-network where both fit."""
        rounds = math.ceil(self.request.effort.evaluations / ROUND)
        moved = 0.0 if self.choices.keeps_both else 2 * self.weights / PCIE_BANDWIDTH
        seconds = self.request.effort.evaluations * self.measuring_seconds + rounds * moved
        served = self._candidate_bytes
        if self._engine != "vllm" or not self.capacity.on_gpu:
            return Need(0, HOST_RESERVE + served, seconds)
        beside = self.scoring().gpu_bytes if self.choices.keeps_both else 0
        aside = 0 if self.choices.keeps_both else self.weights
        return Need(served + VLLM_RESERVE + beside, HOST_RESERVE + aside, seconds + LOAD_SECONDS)

    @property
    def measuring_seconds(self) -> float:
        """Of one candidate: built, warmed up, and repeated for as long as was asked or three times."""
        if not (self._engine == "vllm" and self.capacity.on_gpu):
            return self._start_seconds + self.request.effort.bench_seconds
        workload = self.request.profile.workload
        prompts = workload.prompt_tokens * workload.concurrency
        mean = self._mean_forward
        prefill = prompts * mean / (self.capacity.flops * SHARE["prefill"])
        step = mean / 2 / (self.capacity.bandwidth * BANDWIDTH_SHARE)  # INT8: a byte a parameter
        output = min(workload.output_tokens, 48 + max(0, workload.output_tokens - 48) / 2)
        repeat = prefill + output * step
        repeats = max(3.0, self.request.effort.bench_seconds / repeat)
        repeats = min(repeats, 8.0)
        return self._start_seconds + prefill + repeats * repeat

    def artefact(self) -> Need:
        """What ships, scored on both splits by the engine that serves, its prompts read as they are."""
        tokens = sum(self._read_tokens(split) for split in ("search", "report"))
        seconds = tokens * self._mean_forward / (self.capacity.flops * SHARE["prefill"]) + LOAD_SECONDS
        served = self._candidate_bytes + VLLM_RESERVE
        on_host = self._engine != "vllm" or not self.capacity.on_gpu
        return Need(0 if on_host else served, HOST_RESERVE + (served if on_host else 0), seconds)

    def packaging(self) -> Need:
        """One matrix in memory at a time, written and read back."""
        size = 2 * self.parameters
        largest = max(self.shape.vocab_size, self.shape.intermediate_size) * self.shape.hidden_size
        return Need(0, HOST_RESERVE + 16 * largest, 15 + 4 * size / DISK_BANDWIDTH)

    def both(self) -> int:
        """Bytes of a GPU that holds the super-network while vLLM measures on it."""
        return replace(self, choices=replace(self.choices, keeps_both=True)).measuring().gpu_bytes

    def _need(self, computing: int, aside: int, seconds: float) -> Need:
        """Of work where the run computes, with so many bytes on the host in any case."""
        if self.capacity.on_gpu:
            return Need(GPU_RESERVE + computing, HOST_RESERVE + aside, seconds)
        return Need(0, HOST_RESERVE + computing + aside, seconds)

    def _scoring_bytes(self, weights: int) -> int:
        place = "gpu" if self.capacity.on_gpu else "cpu"
        room = (self.capacity.gpu_bytes or self.capacity.host_bytes) - weights
        wave = wave_tokens(room, self._kept_per_token) * self._kept_per_token
        passing = BLOCK_TOKENS[place] * self._layer_per_token
        left = max(0, room - wave - passing - GPU_RESERVE)
        states = self._scored_tokens("search") * self.shape.hidden_size * self.capacity.element
        shared = len(AHEAD) * self.request.effort.evaluations * int(states)
        return weights + wave + passing + min(MOST_BYTES, left // 4, shared)

    @property
    def _candidate_bytes(self) -> int:
        """Of the largest candidate: none over the memory budget is ever built."""
        profile = self.request.profile
        full = served_memory(self.shape, self.space.full, profile).total
        return min(full, profile.budgets.memory_bytes)

    def _served(self, numerics: Numerics) -> int:
        whole = SubNetwork(self.space.full.layers, self.space.full.widths)
        workload = self.request.profile.workload
        needed = required_memory_bytes(self.shape, whole, workload, numerics, self._engine).total
        return needed + (VLLM_RESERVE if self._engine == "vllm" else 0)

    def _split_seconds(self, split: str, *, whole: bool) -> float:
        forward = self._forward if whole else self._mean_forward
        return self._scored_tokens(split) * forward / (self.capacity.flops * SHARE["scoring"])

    def _scored_tokens(self, split: str) -> float:
        if self.request.scores_agreement:
            return self.request.effort.score_sequences // 2 * self.request.effort.sequence_length
        return sum(task.scored_tokens(split, self.request.limit) for task in self._tasks)

    def _read_tokens(self, split: str) -> float:
        if self.request.scores_agreement:
            return self._scored_tokens(split)
        return sum(task.read_tokens(split, self.request.limit) for task in self._tasks)

    @property
    def _tasks(self) -> list[TaskSize]:
        return sizes(self.request.tasks)

    @property
    def _engine(self) -> EngineName:
        return self.request.profile.engine

    @property
    def _start_seconds(self) -> float:
        if self._engine == "onnxruntime":
            return STARTS["onnxruntime"]
        return STARTS["gpu" if self.capacity.on_gpu else "cpu"]

    @property
    def _forward(self) -> float:
        """Operations of a token through the whole model."""
        return 2.0 * self.parameters

    @property
    def _mean_forward(self) -> float:
        """The same through a sub-network half way between the smallest and the whole model."""
        return float(self.parameters + parameter_count(self.shape, self.space.smallest))

    @property
    def _kept_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.shape.num_layers * self.shape.kv_size * self.capacity.element

    @property
    def _layer_per_token(self) -> int:
        """Bytes of what a layer computes of a token, all of it kept: what a step learns from."""
        shape = self.shape
        numbers = 8 * shape.hidden_size + 2 * (shape.q_size + shape.kv_size) + 4 * shape.intermediate_size
        return numbers * self.capacity.element

    @property
    def _launches(self) -> float:
        return self.shape.num_layers * LAUNCH_SECONDS if self.capacity.on_gpu else 0.0
