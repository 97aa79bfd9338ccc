"""Measuring a model in plain PyTorch: the reference that a user has before compressing."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from compressor.engines.bench import summarise, time_workload
from compressor.engines.host import HostWatch, host_conditions
from compressor.engines.memory import peak_bytes, reset_peak, resident_bytes
from compressor.measurement import Measurement
from compressor.profile import Workload


def bench_pytorch(
    model: PreTrainedModel, workload: Workload, *, max_seconds: float = 10.0, min_repeats: int = 3
) -> Measurement:
    """TTFT, TPOT and throughput of a transformers model as it stands, on its own device."""
    watch, before = HostWatch(), resident_bytes()
    reset_peak()
    with torch.inference_mode():
        runner = TorchRunner(model, workload)
        timings = time_workload(runner, workload, max_seconds=max_seconds, min_repeats=min_repeats)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    conditions = {
        "engine": f"torch {torch.__version__}",
        "provider": str(model.device),
        "threads": torch.get_num_threads(),
        "numerics": str(model.dtype).removeprefix("torch."),
        **host_conditions(),
        **watch.marks(),
    }
    peak = weights + max(0, peak_bytes() - before)
    return summarise(timings, workload, peak_memory_bytes=peak, conditions=conditions)


class TorchRunner:
    """``bench.Runner`` over a transformers model."""

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        generator = torch.Generator().manual_seed(0)
        dims = (workload.concurrency, workload.prompt_tokens)
        prompts = torch.randint(model.config.vocab_size, dims, generator=generator)
        self._model = model
        self._prompts = prompts.to(model.device)
        self._cache: Cache | None = None
        self._next = self._prompts[:, :1]

    def prefill(self) -> None:
        self._cache = None
        self._advance(self._prompts)

    def step(self) -> None:
        self._advance(self._next)

    def skip(self, tokens: int) -> None:
        for _ in range(tokens):
            self.step()

    def _advance(self, ids: torch.Tensor) -> None:
        result = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = result.past_key_values
        self._next = result.logits[:, -1].argmax(dim=-1, keepdim=True)
        if self._next.is_cuda:
            torch.cuda.synchronize(self._next.device)
