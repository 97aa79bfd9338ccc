"""What benchmarks/evaluation.py measures, one unit at a time, each giving figures as a dictionary."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from compressor.compute import fastest_cpu_dtype
from compressor.engines.memory import peak_bytes
from compressor.evaluation import attention, kernels, products
from compressor.evaluation.scorer import PackedLM
from compressor.evaluation.tasks import load_tasks
from compressor.space import SearchSpace, SubNetwork

THREADS = 2
MMLU_SUBJECTS = ("abstract_algebra", "anatomy", "astronomy")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SLICE = 20
Requests = list[Any]


class Bench:
    """The starter model and the requests, made once; each method measures one thing."""

    def __init__(self, data: Path, items: int, device: str = "cpu") -> None:
        self.data = data
        self.items = items
        self.device = device
        torch.set_num_threads(THREADS)

    @cached_property
    def folder(self) -> Path:
        from compressor import models

        self._scratch = tempfile.TemporaryDirectory(prefix="bench-evaluation-")
        folder = Path(self._scratch.name) / "model"
        models.to_folder(models.resolve("starter"), folder)
        return folder

    @lru_cache(maxsize=1)  # noqa: B019 - one bench a process; one model in memory at a time
    def model(self, dtype: str) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=DTYPES[dtype]).eval()
        return model.to(self.device)

    @cached_property
    def own_dtype(self) -> str:
        """What ours computes in: a run's choice on this machine."""
        fastest = fastest_cpu_dtype() if self.device == "cpu" else torch.bfloat16
        return {dtype: name for name, dtype in DTYPES.items()}[fastest]

    @property
    def own_model(self) -> Any:
        return self.model(self.own_dtype)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cache  # noqa: B019
    def requests(self, task: str) -> Requests:
        """All items of three subjects, or the first items of a task's report split."""
        if task != "mmlu":
            return self._requests(task, self.items, ("report",))
        return [
            request
            for subject in MMLU_SUBJECTS
            for request in self._requests(f"mmlu_{subject}", None, ("search", "report"))
        ]

    def _requests(self, name: str, limit: int | None, splits: Sequence[Any]) -> Requests:
        made: Requests = []
        for split in splits:
            task = load_tasks(name, split, self.data, 5 if name.startswith("mmlu") else None)[0].task
            task.build_all_requests(limit=limit)
            made += task.instances
        return made

    def hflm(self, task: str, dtype: str, batch: int, slice_items: bool = False) -> dict[str, Any]:
        """lm-eval's own model on a task's requests; ``slice_items``: on an even sample."""
        requests = self.requests(task)
        if slice_items:
            requests = _slice(requests)
        lm = self.hflm_of(dtype, batch)
        return timed(lambda: lm.loglikelihood(requests, disable_tqdm=True)) | {"batch": batch}

    def hflm_of(self, dtype: str, batch: int) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=self.model(dtype), tokenizer=self.tokenizer, batch_size=batch)

    def ours(self, task: str, share: float = 1.0) -> dict[str, Any]:
        """Our scorer; ``first_seconds`` include tokenization, as in a run's first evaluation."""
        requests = self.requests(task)
        requests = requests[: round(len(requests) * share)]
        lm = PackedLM(self.own_model, self.tokenizer)
        first = timed(lambda: lm.loglikelihood(requests))
        again = timed(lambda: lm.loglikelihood(requests))
        plan = lm.plan_of(requests)
        raw = sum(len(encoded.inputs) for encoded in plan.encoded)
        figures = {"first_seconds": first["seconds"], "tokens": plan.packing.tokens, "raw_tokens": raw}
        return again | figures | {"dtype": self.own_dtype}

    def half_flops(self) -> dict[str, Any]:
        """Our scorer on a sub-network of half the whole model's matrix products."""
        from compressor.supernet.elastic import Elastic

        elastic = Elastic(self.own_model)
        shape = elastic.shape
        whole = SearchSpace(shape, (shape.num_layers,), (shape.intermediate_size,)).full
        lm = PackedLM(self.own_model, self.tokenizer)
        requests = self.requests("arc_easy")
        lm.loglikelihood(requests[:8])
        plan = lm.plan_of(requests)
        costs = (plan.packing.tokens, plan.packing.num_rows)
        for depth in range(shape.num_layers, 0, -1):
            subnet = SubNetwork(tuple(range(depth)), (shape.intermediate_size,) * depth)
            if matrix_flops(shape, subnet, *costs) <= 0.5 * matrix_flops(shape, whole, *costs):
                break
        with elastic.activated(subnet):
            figures = timed(lambda: lm.loglikelihood(requests))
        share = matrix_flops(shape, subnet, *costs) / matrix_flops(shape, whole, *costs)
        return figures | {"flops_share": share, "layers": subnet.depth}

    def peak(self) -> dict[str, Any]:
        """The machine's matrix peak: a large product in each dtype, the best of many.

        CPUs without bf16 take half a minute for that one: there it is the best of few.
        """
        best = {}
        for name, dtype in DTYPES.items():
            a, b = torch.randn(4096, 1536, dtype=dtype), torch.randn(1536, 1536, dtype=dtype)
            seconds, deadline = float("inf"), time.monotonic() + 10
            for _ in range(20):
                seconds = min(seconds, timed(lambda a=a, b=b: a @ b)["seconds"])
                if time.monotonic() > deadline:
                    break
            best[f"{name}_gflop_s"] = 2 * 4096 * 1536 * 1536 / seconds / 1e9
        return best

    def breakdown(self, task: str) -> dict[str, Any]:
        """Where the time of a task goes, by the profiler, and matrix products against the peak."""
        from torch._C._profiler import _ExperimentalConfig
        from torch.profiler import ProfilerActivity, profile

        lm = PackedLM(self.own_model, self.tokenizer)
        requests = self.requests(task)
        lm.loglikelihood(requests)
        plain = timed(lambda: lm.loglikelihood(requests))["seconds"]
        everywhere = _ExperimentalConfig(profile_all_threads=True)  # passes run in threads of their own
        with (
            _kernels_recorded(),
            profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as profiler,
        ):
            lm.loglikelihood(requests)
        times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        total = sum(times.values())
        groups = {name: sum(times.get(key, 0) for key in keys) / total for name, keys in _GROUPS.items()}
        plan = lm.plan_of(requests)
        from compressor.models import shape_of_config

        shape = shape_of_config(self.own_model.config)
        whole = SearchSpace(shape, (shape.num_layers,), (shape.intermediate_size,)).full
        flops = matrix_flops(shape, whole, plan.packing.tokens, plan.packing.num_rows)
        at_peak = {name: flops / (speed * 1e9) for name, speed in self.peak().items()}
        top = sorted(times.items(), key=lambda pair: -pair[1])[:8]
        return {
            "seconds": plain,
            "dtype": self.own_dtype,
            "share_at_bf16_peak": at_peak["bf16_gflop_s"] / plain,
            "share_at_fp32_peak": at_peak["fp32_gflop_s"] / plain,
            "shares": groups | {"rest": 1 - sum(groups.values())},
            "top": {key: round(value / total, 4) for key, value in top},
        }

    def memory(self, who: str, batch: int) -> dict[str, Any]:
        """Peak resident memory of a fresh process that scores a sample of arc_easy and of mmlu."""
        command = [
            sys.executable,
            __file__,
            who,
            str(self.data),
            str(self.items),
            str(self.folder),
            str(batch),
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {"peak_bytes": int(output.split()[-1])}


_GROUPS = {
    "matrix products, with what they do as they go": (
        *("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
        *("_multiply", "_score_vocabulary"),
    ),
    "attention": (
        *("aten::bmm", "aten::_softmax", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        *("_masked_softmax", "_attend"),
    ),
    "softmax over the vocabulary": (
        *("aten::amax", "aten::sub", "aten::exp_", "aten::sum", "aten::log_"),
        "_largest_and_total",
    ),
    "gathering and copying": ("aten::index", "aten::index_select", "aten::copy_", "aten::cat", "_by_head"),
    "norms, rotation, gates, residuals": (
        *(
            "aten::mul",
            "aten::mul_",
            "aten::addcmul_",
            "aten::add",
            "aten::add_",
            "aten::silu",
            "aten::silu_",
        ),
        *("aten::pow", "aten::pow_", "aten::mean", "aten::rsqrt", "aten::linalg_vector_norm", "aten::div_"),
        *("_rms_norm", "_gated", "_rotated_by_head"),
    ),
}
_KERNELS = {
    kernels: ("_rms_norm", "_gated", "_rotated_by_head", "_by_head", "_masked_softmax", "_largest_and_total"),
    products: ("_multiply", "_score_vocabulary"),
    attention: ("_attend",),
}


@contextmanager
def _kernels_recorded() -> Iterator[None]:
    """Our own kernels, which torch's profiler doesn't know, recorded by it as well."""
    plain = {(module, name): getattr(module, name) for module, names in _KERNELS.items() for name in names}

    def recorded(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            with torch.profiler.record_function(name):
                kernel(*arguments)

        return run

    for (module, name), kernel in plain.items():
        setattr(module, name, recorded(name, kernel))
    try:
        yield
    finally:
        for (module, name), kernel in plain.items():
            setattr(module, name, kernel)


def matrix_flops(shape: Any, subnet: SubNetwork, tokens: int, rows: int) -> float:
    """Floating-point operations of the linear layers over ``tokens`` and of the head over ``rows``."""
    attention = sum(n * k for n, k in shape.attention_matrices())
    layers = sum(attention + sum(n * k for n, k in shape.mlp_matrices(w)) for w in subnet.widths)
    return 2.0 * (tokens * layers + rows * shape.vocab_size * shape.hidden_size)


def timed(run: Callable[[], Any]) -> dict[str, Any]:
    """Wall and processor time of a run, and the share of the machine that others took meanwhile."""
    gc.collect()
    own, machine = psutil.Process().cpu_times(), psutil.cpu_times()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    mine, all_ = psutil.Process().cpu_times(), psutil.cpu_times()
    busy = sum(getattr(all_, kind) - getattr(machine, kind) for kind in ("user", "nice", "system"))
    cpu = mine.user + mine.system - own.user - own.system
    others = max(0.0, busy - cpu) / seconds / (psutil.cpu_count() or 1)
    return {"seconds": seconds, "cpu_seconds": cpu, "others": round(others, 3)}


def items_of(requests: Requests) -> list[slice]:
    """Slices of the requests that belong to one item each."""
    keys = [(request.task_name, id(request.doc)) for request in requests]
    cuts = [0, *(i for i in range(1, len(keys)) if keys[i] != keys[i - 1]), len(keys)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def _slice(requests: Requests) -> Requests:
    return [request for mine in items_of(requests)[::SLICE] for request in requests[mine]]


def _memory_child(who: str, data: str, items: str, folder: str, batch: str) -> None:
    bench = Bench(Path(data), int(items))
    bench.__dict__["folder"] = Path(folder)
    scorer = (
        bench.hflm_of("bf16", int(batch)) if who == "hflm" else PackedLM(bench.own_model, bench.tokenizer)
    )
    for task in ("arc_easy", "mmlu"):
        scorer.loglikelihood(_slice(bench.requests(task)), disable_tqdm=True)
    print(peak_bytes())


if __name__ == "__main__":
    _memory_child(*sys.argv[1:])
