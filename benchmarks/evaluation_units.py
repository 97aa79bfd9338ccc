"""What benchmarks/evaluation.py measures, one unit at a time, each giving figures as a dictionary."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from compressor.evaluation.evaluator import TaskEvaluator
from compressor.evaluation.scorer import PackedLM
from compressor.evaluation.tasks import load_tasks
from compressor.space import SearchSpace, SubNetwork

THREADS = 2
MMLU_SUBJECTS = ("abstract_algebra", "anatomy", "astronomy")
ACCURACY_SUBJECTS = (
    *MMLU_SUBJECTS,
    "business_ethics",
    "college_biology",
    "computer_security",
    "econometrics",
)
ACCURACY_SUBJECTS += ("global_facts", "human_aging", "management", "marketing", "virology")
ACCURACY_TASKS = ("arc_challenge", "arc_easy", "mmlu", "truthfulqa_mc1", "winogrande")
ACCURACY_LIMITS = {"mmlu": 10}
ACCURACY_LIMIT = 100
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RACERS = 12
RACE_ITEMS = 200
SLICE = 20
Requests = list[Any]


class Bench:
    """The starter model and the requests, made once; each method measures one thing."""

    def __init__(self, data: Path, items: int) -> None:
        self.data = data
        self.items = items
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

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=DTYPES[dtype]).eval()

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
        lm = self._hflm(dtype, batch)
        return _timed(lambda: lm.loglikelihood(requests, disable_tqdm=True)) | {"batch": batch}

    def _hflm(self, dtype: str, batch: int) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=self.model(dtype), tokenizer=self.tokenizer, batch_size=batch)

    def ours(self, task: str, dtype: str, share: float = 1.0) -> dict[str, Any]:
        """Our scorer, tokenization included in ``first_seconds``, as in a run's first evaluation."""
        requests = self.requests(task)
        requests = requests[: round(len(requests) * share)]
        lm = PackedLM(self.model(dtype), self.tokenizer)
        first = _timed(lambda: lm.loglikelihood(requests))
        again = _timed(lambda: lm.loglikelihood(requests))
        plan = lm.plan_of(requests)
        raw = sum(len(encoded.inputs) for encoded in plan.encoded)
        figures = {"first_seconds": first["seconds"], "tokens": plan.packing.tokens, "raw_tokens": raw}
        return again | figures

    def half_flops(self) -> dict[str, Any]:
        """Our scorer on a sub-network of half the whole model's matrix products."""
        from compressor.supernet.elastic import Elastic

        elastic = Elastic(self.model("bf16"))
        shape = elastic.shape
        whole = SearchSpace(shape, (shape.num_layers,), (shape.intermediate_size,)).full
        lm = PackedLM(self.model("bf16"), self.tokenizer)
        requests = self.requests("arc_easy")
        lm.loglikelihood(requests[:8])
        plan = lm.plan_of(requests)
        costs = (plan.packing.tokens, plan.packing.num_rows)
        for depth in range(shape.num_layers, 0, -1):
            subnet = SubNetwork(tuple(range(depth)), (shape.intermediate_size,) * depth)
            if matrix_flops(shape, subnet, *costs) <= 0.5 * matrix_flops(shape, whole, *costs):
                break
        with elastic.activated(subnet):
            figures = _timed(lambda: lm.loglikelihood(requests))
        share = matrix_flops(shape, subnet, *costs) / matrix_flops(shape, whole, *costs)
        return figures | {"flops_share": share, "layers": subnet.depth}

    def peak(self) -> dict[str, Any]:
        """The machine's matrix peak: a large bf16 product, the best of many."""
        a = torch.randn(4096, 1536, dtype=torch.bfloat16)
        b = torch.randn(1536, 1536, dtype=torch.bfloat16)
        best = min(_timed(lambda: a @ b)["seconds"] for _ in range(20))
        return {"gflop_s": 2 * 4096 * 1536 * 1536 / best / 1e9}

    def breakdown(self) -> dict[str, Any]:
        """Where the time of arc_easy goes, by the profiler, and matrix products against the peak."""
        from torch.profiler import ProfilerActivity, profile

        lm = PackedLM(self.model("bf16"), self.tokenizer)
        requests = self.requests("arc_easy")
        lm.loglikelihood(requests)
        plain = _timed(lambda: lm.loglikelihood(requests))["seconds"]
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            lm.loglikelihood(requests)
        times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        total = sum(times.values())
        groups = {name: sum(times.get(key, 0) for key in keys) / total for name, keys in _GROUPS.items()}
        plan = lm.plan_of(requests)
        from compressor.models import shape_of_config

        shape = shape_of_config(self.model("bf16").config)
        whole = SearchSpace(shape, (shape.num_layers,), (shape.intermediate_size,)).full
        flops = matrix_flops(shape, whole, plan.packing.tokens, plan.packing.num_rows)
        at_peak = flops / (self.peak()["gflop_s"] * 1e9)
        top = sorted(times.items(), key=lambda pair: -pair[1])[:8]
        return {
            "seconds": plain,
            "matrix_seconds_at_peak": at_peak,
            "matrix_share_at_peak": at_peak / plain,
            "shares": groups | {"rest": 1 - sum(groups.values())},
            "top": {key: round(value / total, 4) for key, value in top},
        }

    def exactness(self, task: str) -> dict[str, Any]:
        """fp32: our log-likelihoods and answers against lm-eval's own model."""
        requests = self.requests(task)
        theirs = self._hflm("fp32", 4).loglikelihood(requests, disable_tqdm=True)
        ours = PackedLM(self.model("fp32"), self.tokenizer).loglikelihood(requests)
        a, b = (np.array([value for value, _ in results]) for results in (ours, theirs))
        other = sum(int(np.argmax(a[mine]) != np.argmax(b[mine])) for mine in _items_of(requests))
        return {
            "max_difference": float(np.abs(a - b).max()),
            "other_answers": other,
            "items": len(_items_of(requests)),
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

    def accuracy(self, name: str) -> dict[str, Any]:
        """Accuracy of the unpruned starter by both scorers, in fp32, through lm-eval's own metrics."""
        names = [f"mmlu_{subject}" for subject in ACCURACY_SUBJECTS] if name == "mmlu" else [name]
        limit = ACCURACY_LIMITS.get(name, ACCURACY_LIMIT)
        shots = 5 if name == "mmlu" else None
        ours = TaskEvaluator(names, self.tokenizer, self.data, shots, limit, max_length=8192)
        score = ours.score(self.model("fp32"), "report")
        hflm, right = self._hflm("fp32", 4), []
        for loaded in load_tasks(names, "report", self.data, shots, limit):
            loaded.task.build_all_requests(limit=limit)
            results = hflm.loglikelihood(loaded.task.instances, disable_tqdm=True)
            for mine in _items_of(loaded.task.instances):
                doc = loaded.task.instances[mine.start].doc
                right.append(loaded.task.process_results(doc, results[mine])["acc"])
        figures = {"hflm": float(np.mean(right)), "ours": score.value, "items": score.n}
        return figures | {"low": score.low, "high": score.high}

    def race(self) -> dict[str, Any]:
        """Sub-networks of the sorted starter, all scored in full, then raced: the same front, and cheaper."""
        from compressor.supernet.elastic import Elastic

        model = self.model("bf16")
        evaluator = TaskEvaluator("arc_easy", self.tokenizer, self.data, limit=RACE_ITEMS, max_length=8192)
        subnets = self._racers(model)
        elastic = Elastic(model)
        full, started = [], time.perf_counter()
        for subnet in subnets:
            with elastic.activated(subnet):
                full.append(evaluator.score(model, "search"))
        full_seconds = time.perf_counter() - started
        sizes = [sum(subnet.widths) for subnet in subnets]
        raced: list[Any] = []
        started = time.perf_counter()
        for number, subnet in enumerate(subnets):
            rivals = [
                raced[i].score.items
                for i in range(number)
                if raced[i].dominated_by is None and sizes[i] <= sizes[number]
            ]
            with elastic.activated(subnet):
                raced.append(evaluator.race(model, rivals, "search"))
        raced_seconds = time.perf_counter() - started
        fronts = [
            _front(sizes, [score.value for score in scores])
            for scores in (full, [race.score for race in raced])
        ]
        return {
            "sub_networks": len(subnets),
            "stopped": sum(race.dominated_by is not None for race in raced),
            "items_full": sum(race.total for race in raced),
            "items_raced": sum(race.evaluated for race in raced),
            "seconds_full": full_seconds,
            "seconds_raced": raced_seconds,
            "front": fronts[0],
            "same_front": fronts[0] == fronts[1],
        }

    def _racers(self, model: Any) -> list[SubNetwork]:
        """Random sub-networks of the starter, neurons and layers ranked on WikiText first."""
        from compressor.supernet.importance import rank, sort_neurons

        text = (self.data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:40000]
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"][0, :8192].view(16, 512)
        importance = rank(model, list(ids.split(4)))
        sort_neurons(model, importance)
        from compressor.models import shape_of_config

        space = SearchSpace.from_fractions(
            shape_of_config(model.config), (0.8, 0.9, 1.0), (0.5, 0.75, 1.0), importance.drop_order
        )
        rng = np.random.default_rng(0)
        uniform = [space.smallest, space.uniform(30, 768), space.uniform(30, 1152), space.largest]
        return [*uniform, *(space.sample(rng) for _ in range(RACERS - len(uniform)))]


_GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "softmax": ("aten::_softmax", "aten::logsumexp", "aten::exp", "aten::sum", "aten::amax"),
    "gathering": ("aten::index", "aten::index_select", "aten::copy_", "aten::cat", "aten::index_put_"),
    "norms, rotation, gates": (
        "aten::mul", "aten::mul_", "aten::addcmul_", "aten::pow", "aten::mean", "aten::rsqrt", "aten::silu",
        "aten::add", "aten::add_",
    ),
}  # fmt: skip


def matrix_flops(shape: Any, subnet: SubNetwork, tokens: int, rows: int) -> float:
    """Floating-point operations of the linear layers over ``tokens`` and of the head over ``rows``."""
    attention = sum(n * k for n, k in shape.attention_matrices())
    layers = sum(attention + sum(n * k for n, k in shape.mlp_matrices(w)) for w in subnet.widths)
    return 2.0 * (tokens * layers + rows * shape.vocab_size * shape.hidden_size)


def _timed(run: Callable[[], Any]) -> dict[str, Any]:
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


def _items_of(requests: Requests) -> list[slice]:
    """Slices of the requests that belong to one item each."""
    keys = [(request.task_name, id(request.doc)) for request in requests]
    cuts = [0, *(i for i in range(1, len(keys)) if keys[i] != keys[i - 1]), len(keys)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def _slice(requests: Requests) -> Requests:
    return [request for mine in _items_of(requests)[::SLICE] for request in requests[mine]]


def _front(sizes: list[int], accuracies: list[float]) -> list[int]:
    """Numbers of the sub-networks that none dominates."""
    points = list(zip(sizes, accuracies, strict=True))
    return [
        i
        for i, (size, accuracy) in enumerate(points)
        if not any(s <= size and a >= accuracy and (s, a) != (size, accuracy) for s, a in points)
    ]


def _memory_child(who: str, data: str, items: str, folder: str, batch: str) -> None:
    bench = Bench(Path(data), int(items))
    bench.__dict__["folder"] = Path(folder)
    scorer = (
        bench._hflm("bf16", int(batch)) if who == "hflm" else PackedLM(bench.model("bf16"), bench.tokenizer)
    )
    for task in ("arc_easy", "mmlu"):
        scorer.loglikelihood(_slice(bench.requests(task)), disable_tqdm=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    _memory_child(*sys.argv[1:])
