"""What an NVIDIA GPU does: our scorer beside lm-eval's own model, tuning, and speed of a sub-network.

On the starter, and on a model of LLaMA-2 7B's shape with random weights, which takes as long as the real
one. Prints tables, then one line of JSON; exits 1 if a bound is missed. Without a GPU, or without
../shared/data, it says so and exits 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import evaluation_exact as exact
import torch
from evaluation_units import Bench, Requests
from lm_eval.api.model import LM
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from verdict import Bound, conclude

from compressor.compute import product_flops
from compressor.engines.bench import WARM_UP_STEPS
from compressor.engines.pytorch import bench_pytorch
from compressor.evaluation.scorer import PackedLM
from compressor.events import StageProgress
from compressor.profile import Workload
from compressor.space import SearchSpace, SubNetwork, parameter_count
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, finetune

logging.getLogger("lm_eval").setLevel(logging.ERROR)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TASKS = ("arc_easy", "winogrande", "mmlu")
ITEMS, REPEATS = 500, 3
BATCHES = {"starter": (64, 256), "7B": (16, 64)}
WORKLOADS = (
    Workload(prompt_tokens=512, output_tokens=128),
    Workload(prompt_tokens=1024, output_tokens=128, concurrency=8),
)
SIZES = (1.0, 1.5, 2.0)
"""Times that a sub-network has fewer parameters."""
ROW_TOKENS = 512
PARTS = ("exact", "scorer", "speed", "tuning")
LARGEST_DIFFERENCE = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--models", default=",".join(BATCHES), help="on what")
    options = parser.parse_args()
    for given, known in ((options.parts, PARTS), (options.models, tuple(BATCHES))):
        if unknown := sorted(set(given.split(",")) - set(known)):
            parser.error(f"no {', '.join(unknown)}: choose from {', '.join(known)}")
    if not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU: nothing to measure")
        return 0
    if not DATA.is_dir():
        print(f"no data sets at {DATA}: nothing to measure")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    peak = product_flops(torch.device("cuda"), torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {peak / 1e12:.0f} TFLOP/s in bf16")
    parts, bounds, figures = options.parts.split(","), [], {"bf16_tflop_s": peak / 1e12}
    measures: dict[str, Callable[[str, Bench], Any]] = {
        "scorer": scorer,
        "speed": speed,
        "tuning": tuning,
    }
    for name in options.models.split(","):
        bench = Bench(DATA, ITEMS, "cuda") if name == "starter" else SevenB(DATA, ITEMS, "cuda")
        if "exact" in parts and name == "starter":
            bounds += exactness(bench)
        for part, measured in measures.items():
            if part in parts:
                figures[f"{part}_{name}"] = measured(name, bench)
    return conclude(bounds, figures)


class SevenB(Bench):
    """LLaMA-2 7B's shape with random weights and the starter's vocabulary, whose tokenizer it has."""

    def model(self, dtype: str) -> Any:
        del dtype
        if "_model" not in self.__dict__:
            self._model = seven_b(len(self.tokenizer))
        return self._model


def seven_b(vocabulary: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def exactness(bench: Bench) -> list[Bound]:
    """fp32 without TF32: largest difference of a choice's log-likelihood, and items answered otherwise."""
    bounds = []
    print(f"\n{'fp32':<12}{'items':>8}{'largest difference':>20}{'other answers':>15}")
    for task in TASKS:
        theirs, ours = (exact.loglikelihoods(bench, who, task) for who in exact.SCORERS)
        found = exact.compare(bench, task, theirs, ours)
        difference, other = found["max_difference"], found["other_answers"]
        print(f"{task:<12}{found['items']:>8}{difference:>20.1e}{other:>15}", flush=True)
        bounds.append(Bound(f"fp32_max_difference_{task}", difference, LARGEST_DIFFERENCE))
        bounds.append(Bound(f"fp32_other_answers_{task}", other, 0))
    return bounds


def scorer(name: str, bench: Bench) -> dict[str, Any]:
    """Seconds of lm-eval's own model at its best batch size, and of ours, in turns; the medians."""
    figures: dict[str, Any] = {}
    ours = PackedLM(bench.own_model, bench.tokenizer)
    print(f"\n{name:<12}{'HFLM s':>10}{'batch':>8}{'ours s':>10}{'times':>8}   tokens")
    for task in TASKS:
        requests = bench.requests(task)
        best = _best_batch(bench, requests, BATCHES[name])
        theirs = bench.hflm_of("bf16", best)
        plan = ours.plan_of(requests)
        ours.loglikelihood(requests)
        pairs = [(_seconds(theirs, requests), _seconds(ours, requests)) for _ in range(REPEATS)]
        a, b = (sorted(times)[REPEATS // 2] for times in zip(*pairs, strict=True))
        raw = sum(len(encoded.inputs) for encoded in plan.encoded)
        print(f"{task:<12}{a:>10.3f}{best:>8}{b:>10.3f}{a / b:>7.1f}×   {plan.packing.tokens:,} of {raw:,}")
        sys.stdout.flush()
        figures[task] = {"hflm_s": a, "batch": best, "ours_s": b, "times": a / b}
    return figures


def speed(name: str, bench: Bench) -> list[dict[str, Any]]:
    """TTFT, TPOT, memory and energy in PyTorch of the whole model and of sub-networks."""
    elastic, rows = Elastic(bench.own_model), []
    space = _space(elastic)
    whole = parameter_count(space.shape, space.full)
    head = ("smaller", "layers", "width", "TTFT ms", "TPOT ms", "tok/s", "GiB", "J a token")
    for workload in WORKLOADS:
        print(f"\n{name + ' ' + workload.label:<20}" + "".join(f"{title:>11}" for title in head))
        for size in SIZES:
            subnet = _of_size(space, whole / size) if size > 1 else space.full
            with elastic.activated(subnet) as model:
                found = bench_pytorch(model, workload, max_seconds=3)
            tokens = workload.concurrency * (found.repeats * workload.output_tokens + 1 + WARM_UP_STEPS)
            joules = found.conditions.get("energy_j")
            row = {
                "smaller": whole / parameter_count(space.shape, subnet),
                "layers": subnet.depth,
                "width": max(subnet.widths),
                "ttft_ms": found.ttft_ms,
                "tpot_ms": found.tpot_ms,
                "tok_s": found.throughput_tok_s,
                "gib": found.peak_memory_bytes / 2**30,
                "joules": None if joules is None else joules / tokens,
            }
            cells = "".join(f"{value or 0:>11.4g}" for value in row.values())
            print(f"{'':<20}{cells}", flush=True)
            rows.append({"workload": workload.label, **row})
    return rows


def tuning(name: str, bench: Bench) -> dict[str, Any]:
    """Tokens a second of the super-network's tuning; of 7B by adapters, of the starter all weights."""
    big = name != "starter"
    elastic = Elastic(bench.own_model)
    space = _space(elastic)
    config = FinetuneConfig(steps=12, batch=8, lora_rank=16 if big else 0, gradient_checkpointing=big)
    ids = torch.randint(
        elastic.shape.vocab_size, (64, ROW_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    times: list[float] = []

    def listen(event: Any) -> None:
        if isinstance(event, StageProgress) and event.stage == "supernet":
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    torch.cuda.reset_peak_memory_stats()
    finetune(elastic, space, ids, config, listen)
    steps = (len(times) - 1) - 4
    rate = config.batch * ROW_TOKENS * steps / (times[-1] - times[4])
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"\n{name}: tuning {rate:,.0f} tokens/s, {peak:.1f} GiB at most", flush=True)
    return {"tokens_s": rate, "peak_gib": peak}


def _space(elastic: Elastic) -> SearchSpace:
    shape = elastic.shape
    depths = tuple(shape.num_layers * part // 16 for part in (12, 14, 16))
    return SearchSpace(shape, depths, (shape.intermediate_size // 2, shape.intermediate_size))


def _of_size(space: SearchSpace, parameters: float) -> SubNetwork:
    """The largest sub-network of evenly fewer layers and neurons that has no more parameters."""
    shape = space.shape
    for percent in range(100, 0, -1):
        depth = round(shape.num_layers * (1 + percent / 100) / 2)
        width = max(64, shape.intermediate_size * percent // 100 // 64 * 64)
        subnet = SubNetwork(tuple(range(depth)), (width,) * depth)
        if parameter_count(shape, subnet) <= parameters:
            return subnet
    raise ValueError(f"no sub-network of {parameters:,.0f} parameters")


def _best_batch(bench: Bench, requests: Requests, sizes: tuple[int, ...]) -> int:
    """The batch size that scores a tenth of the requests fastest, the second time."""
    some = requests[: max(4, len(requests) // 40 * 4)]
    times = {}
    for size in sizes:
        lm = bench.hflm_of("bf16", size)
        lm.loglikelihood(some, disable_tqdm=True)
        times[size] = _seconds(lm, some)
    return min(times, key=times.__getitem__)


def _seconds(lm: LM, requests: Requests) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    lm.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
