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
    watch, memory = HostWatch(), _Memory(model.device)
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
        **_gpu_conditions(model.device),
        **watch.marks(),
    }
    peak = weights + memory.grown_bytes()
    return summarise(timings, workload, peak_memory_bytes=peak, conditions=conditions)


class _Memory:
    """Memory from its making on: what torch's allocator holds on a GPU, what is resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._before = resident_bytes()
            reset_peak()

    def grown_bytes(self) -> int:
        """The most that was held beyond what was held at first."""
        on_gpu = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else peak_bytes()
        return max(0, peak - self._before)


def _gpu_conditions(device: torch.device) -> dict[str, str]:
    """The GPU itself as the device that was measured, and the CUDA that torch was built for."""
    if device.type != "cuda":
        return {}
    return {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}


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
        if self._next.is_cuda:  # whose fused attention prepares itself for every new length, in up to 40 ms
            self.prefill()
            self.skip(workload.output_tokens - 1)

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
