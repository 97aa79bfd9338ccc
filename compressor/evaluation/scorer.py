"""The fast exact scorer of log-likelihoods, and the lm-eval LM around it.

Every request's sequence joins one trie; shared prefixes and an item's context are computed once, and
logits only where a choice's token is scored. The results are those of lm-eval's own model, in the
model's numerics; in fp32 they agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.model import LM
from numpy.typing import NDArray
from torch import Tensor

from compressor.compute import gpu_matmul_flops
from compressor.evaluation.encoding import Encoded, Encoder, max_length_of
from compressor.evaluation.forward import PackedModel
from compressor.evaluation.packing import CPU_COSTS, TILED_COSTS, Costs, Packing, pack
from compressor.evaluation.schedule import WAVE_TOKENS, Step, schedule, wave_tokens
from compressor.evaluation.shared_layers import SharedLayers
from compressor.evaluation.workers import most_workers

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAUNCH_SECONDS = 2e-4
"""What a layer takes on a GPU for one more prefix, however short: its kernels are launched one by one."""
_ROLLING_TOKENS = 1 << 16

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids [T] to logits [T, V] after each of them."""


@dataclass(frozen=True)
class Likelihoods:
    """Log-likelihood of each request's continuation (float64[n], nats) and whether it is greedy."""

    values: NDArray[np.float64]
    greedy: NDArray[np.bool_]

    def pairs(self) -> list[tuple[float, bool]]:
        """As lm-eval wants them."""
        return list(zip(self.values.tolist(), self.greedy.tolist(), strict=True))


@dataclass
class Plan:
    """Requests tokenized, packed and laid out once, to be scored by any number of sub-networks."""

    encoded: Sequence[Encoded]
    packing: Packing
    _steps: dict[tuple[torch.device, torch.dtype], list[Step]] = field(default_factory=dict)

    @classmethod
    def of(cls, encoded: Sequence[Encoded], costs: Costs = CPU_COSTS) -> Plan:
        """``costs`` as ``costs_of`` gives them for the model that the plan is for."""
        return cls(encoded, pack(encoded, costs))

    @property
    def truncated(self) -> int:
        """Requests that were longer than the model takes and lost tokens on the left."""
        return sum(request.truncated for request in self.encoded)

    def steps(self, device: torch.device, dtype: torch.dtype, wave: int = WAVE_TOKENS) -> list[Step]:
        """The forward passes for a model on ``device`` that computes in ``dtype``, laid out once."""
        key = device, dtype
        if key not in self._steps:
            self._steps[key] = schedule(self.packing, device, dtype, wave)
        return self._steps[key]


def costs_of(model: PreTrainedModel) -> Costs:
    """What decides which prefixes are worth keeping apart for a model where it is.

    Few on a GPU, which computes many tokens of a small model while one prefix's kernels are launched.
    """
    if model.device.type != "cuda":
        return TILED_COSTS if PackedModel(model).means.tiled else CPU_COSTS
    base: Any = model.base_model
    layer_flops: float = 2.0 * sum(parameter.numel() for parameter in base.layers[0].parameters())
    return Costs(prefix=LAUNCH_SECONDS * gpu_matmul_flops() / layer_flops)


def wave_of(model: PreTrainedModel) -> int:
    """Tokens of prefixes whose keys and values a model keeps at once: fewer where its GPU is small for it."""
    if model.device.type != "cuda":
        return WAVE_TOKENS
    total = torch.cuda.get_device_properties(model.device).total_memory
    weights = sum(parameter.nbytes for parameter in model.parameters())
    config: Any = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kept = 2 * config.num_hidden_layers * heads * head * model.dtype.itemsize
    return wave_tokens(total - weights, kept)


def score_plan(plan: Plan, model: PreTrainedModel, shared: SharedLayers | None = None) -> Likelihoods:
    """Log-likelihoods of a plan's requests under a model, as it stands; see ``PackedModel``."""
    with torch.inference_mode():
        packed = PackedModel(model, shared)
        hidden = packed.run(plan.steps(packed.device, packed.dtype, wave_of(model)), plan.packing.num_rows)
        return _collect(plan.packing, hidden, packed)


def score_by_logits(encoded: Sequence[Encoded], logits: Logits) -> Likelihoods:
    """The same through an engine that gives logits: each distinct sequence is run once."""
    by_input: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(encoded):
        by_input.setdefault(request.inputs, []).append(number)
    values = np.empty(len(encoded))
    greedy = np.empty(len(encoded), np.bool_)
    for inputs, numbers in by_input.items():
        table = logits(np.asarray(inputs, np.int64)).astype(np.float64)
        for number in numbers:
            scored = encoded[number].scored
            targets = np.asarray(encoded[number].ids[-scored:])
            rows = table[-scored:]
            peak = rows.max(axis=1)
            chosen = rows[np.arange(scored), targets]
            values[number] = (chosen - peak - np.log(np.exp(rows - peak[:, None]).sum(axis=1))).sum()
            greedy[number] = bool((rows.argmax(axis=1) == targets).all())
    return Likelihoods(values, greedy)


class PackedLM(LM):  # type: ignore[misc]
    """lm-eval's interface to the scorer, for an activated sub-network or any LLaMA-like model.

    Plans are kept by request, so that scoring the same task again tokenizes nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, max_length or max_length_of(model, tokenizer))
        self.truncated = 0
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        del disable_tqdm
        if not requests:
            return []
        plan = self.plan_of(requests)
        self.truncated = plan.truncated
        return score_plan(plan, self.model).pairs()

    def plan_of(self, requests: list[Instance]) -> Plan:
        """The plan of these requests, made the first time."""
        pairs = tuple(request.args for request in requests)
        if pairs not in self._plans:
            self._plans[pairs] = Plan.of(self.encoder.encode(pairs), costs_of(self.model))
        return self._plans[pairs]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        del disable_tqdm
        totals = []
        for request in requests:
            windows = self.encoder.encode_rolling(request.args[0])
            per_run = max(1, _ROLLING_TOKENS // self.encoder.max_length)
            runs = [windows[i : i + per_run] for i in range(0, len(windows), per_run)]
            totals.append(sum(float(score_plan(Plan.of(r), self.model).values.sum()) for r in runs))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        del requests, disable_tqdm
        raise NotImplementedError("this scorer gives log-likelihoods; choose multiple-choice tasks")


class LogitsLM(PackedLM):
    """lm-eval's interface to an engine: scores the packaged artefact itself through its logits."""

    def __init__(self, logits: Logits, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        LM.__init__(self)
        self.logits = logits
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, max_length)
        self.truncated = 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        del disable_tqdm
        encoded = self.encoder.encode([request.args for request in requests])
        self.truncated = sum(request.truncated for request in encoded)
        return score_by_logits(encoded, self.logits).pairs()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        del disable_tqdm
        windows = [self.encoder.encode_rolling(request.args[0]) for request in requests]
        return [float(score_by_logits(encoded, self.logits).values.sum()) for encoded in windows]


def _collect(packing: Packing, hidden: Tensor, model: PackedModel) -> Likelihoods:
    """Log-probabilities of all targets from final hidden states, summed by request."""
    order = np.argsort(packing.request_rows, kind="stable")
    rows, targets = packing.request_rows[order], packing.targets[order]
    logprobs = np.empty(len(rows))
    greedy = np.empty(len(rows), np.bool_)
    block = model.head.block_rows(packing.num_rows, most_workers())

    def collect(start: int) -> None:
        low, high = np.searchsorted(rows, (start, start + block))
        places = order[low:high]
        found = model.head.likelihoods(
            hidden[start : start + block], rows[low:high] - start, targets[low:high]
        )
        logprobs[places], greedy[places] = found

    model.each(collect, range(0, packing.num_rows, block))
    starts = packing.request_starts[:-1]
    return Likelihoods(np.add.reduceat(logprobs, starts), np.logical_and.reduceat(greedy, starts))
