"""The parts of ``gpu_day.sh``, one a process: each writes what it measured as it goes.

Exit codes: 0 done, 3 not run for want of a GPU, of vLLM, or of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.space import ModelShape, SearchSpace, SubNetwork

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
SEVEN_B = ModelShape(4096, 11008, 32, 32, 32, 128, 32000, max_position_embeddings=4096)
TINY = ModelShape(256, 512, 4, 4, 2, 64, 512, max_position_embeddings=2048)
CAPS_GB = (42.3, 24.1)
"""Of an A100 with 40 GB and an L4 with 24 GB, as their drivers show them."""
NOT_RUN = 3


class NotRunError(Exception):
    """This part has nothing to run on."""


@dataclass
class Day:
    """Where results go, and whether this is a rehearsal on a CPU."""

    out: Path
    rehearse: bool
    part: str
    found: dict[str, Any]

    @property
    def shape(self) -> ModelShape:
        return TINY if self.rehearse else SEVEN_B

    @property
    def space(self) -> SearchSpace:
        return SearchSpace.from_fractions(self.shape, (0.75, 0.875, 1.0), (0.5, 1.0), width_multiple=128)

    @property
    def whole(self) -> SubNetwork:
        full = self.space.full
        return SubNetwork(full.layers, full.widths)

    def note(self, name: str, value: object) -> None:
        """Keep a result at once: the part may be killed after it."""
        self.found[name] = value
        print(f"{name}: {value}", flush=True)
        path = self.out / f"{self.part}.json"
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        scratch.replace(path)

    def folder(self, layers: int = 0) -> Path:
        """A Hugging Face folder of the shape: its configuration, or so many layers of random weights too."""
        path = self.out / f"model-{layers}"
        if not (path / "config.json").is_file():
            path.mkdir(parents=True, exist_ok=True)
            config = _config(self.shape, layers or self.shape.num_layers)
            if layers:
                _random_model(config, "cpu").save_pretrained(path)
            else:
                config.save_pretrained(path)
        return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    day = Day(options.out, options.rehearse, options.part, {})
    import torch

    if not day.rehearse and not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU")
        return NOT_RUN
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU, rehearsed"
    day.note("machine", f"{on}, torch {torch.__version__}")
    try:
        PARTS[options.part](day)
    except NotRunError as error:
        print(error)
        return NOT_RUN
    return 0


def memory(day: Day) -> None:
    """Text and adapter steps under a cap, beside what the plan says of them."""
    import torch

    for cap in CAPS_GB:
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            if cap * 1e9 > total:
                raise NotRunError(f"the GPU has less than {cap} GB")
            torch.cuda.set_per_process_memory_fraction(cap * 1e9 / total)
        _under_cap(day, cap)


def _under_cap(day: Day, cap: float) -> None:
    import torch

    from compressor.pipeline.needs import Capacity
    from compressor.pipeline.plan import profile_space, settled
    from compressor.request import fresh
    from compressor.supernet.elastic import Elastic
    from compressor.supernet.finetune import FinetuneConfig, finetune
    from compressor.supernet.sampling import CachedDecoder

    request = fresh({"profile": "a100-40g", "preset": "standard"})
    capacity = Capacity(250e12, 1555e9, 2**38, int(cap * 1e9))
    estimate = settled(request, SEVEN_B, profile_space(SEVEN_B, request.profile), capacity)
    choices, effort = estimate.choices, request.effort
    day.note(f"{cap} GB, the plan's choice", asdict(choices))
    model = _random_model(_config(day.shape, day.shape.num_layers), _device())
    _reset_peak()
    began = time.monotonic()
    length = effort.sequence_length if not day.rehearse else 16
    batch = choices.text_batch if not day.rehearse else 4
    with torch.inference_mode():
        decoder = CachedDecoder(model, batch, length)
        steps = min(length - 1, 32)
        for _ in range(steps):
            decoder(torch.ones(batch, 1, dtype=torch.long, device=model.device))
    day.note(f"{cap} GB, text: s a step of {batch} sequences", (time.monotonic() - began) / steps)
    day.note(f"{cap} GB, text: bytes planned, allocated", [estimate.text().gpu_bytes, _peak()])
    del decoder
    _reset_peak()
    ids = torch.randint(3, day.shape.vocab_size - 1, (2 * effort.tuning_batch, length))
    config = FinetuneConfig(
        steps=4,
        batch=effort.tuning_batch,
        accumulation=choices.accumulation,
        lora_rank=choices.lora_rank,
        gradient_checkpointing=bool(choices.lora_rank),
    )
    result = finetune(Elastic(model), day.space, ids, config)
    day.note(f"{cap} GB, tuning: s a step", result.seconds / result.steps)
    day.note(f"{cap} GB, tuning: bytes planned, allocated", [estimate.tuning(30).gpu_bytes, _peak()])
    del model
    _free()


def scoring(day: Day) -> None:
    """Tokens a second of items with four choices, and of those after long examples."""
    from compressor.evaluation.scorer import Plan, costs_of, score_plan

    model = _random_model(_config(day.shape, day.shape.num_layers), _device())
    for name, shared in (("short items", 0), ("after 500 tokens of examples", 500)):
        plan = Plan.of(_requests(day, 40 if day.rehearse else 800, shared), costs_of(model))
        for repeat in range(1 if day.rehearse else 3):
            began = time.monotonic()
            score_plan(plan, model)
            seconds = time.monotonic() - began
            rate = plan.packing.tokens / seconds
            day.note(f"{name}, {repeat}: tokens/s, s, tokens", [rate, seconds, plan.packing.tokens])
    day.note("bytes allocated", _peak())


def candidates(day: Day) -> None:
    """Four in one worker: build and measuring time, and what the GPU holds after each."""
    worker = _worker(day)
    space = day.space
    chosen = [space.full, space.smallest, space.uniform(space.depths[1], space.widths[0]), space.largest]
    try:
        for number, subnet in enumerate(chosen):
            began = time.monotonic()
            measured = worker.bench(day.folder(), subnet, _workload(day), max_seconds=3.0)
            day.note(f"{number}: s with build", time.monotonic() - began)
            day.note(f"{number}: ttft ms, tpot ms, peak bytes", _figures(measured))
            day.note(f"{number}: GPU bytes used after it", _used())
    finally:
        worker.close()


def exhausted(day: Day) -> None:
    """A cache far too large, which must be told as such, then a good candidate."""
    from compressor.errors import UnfitMachineError
    from compressor.profile import Workload

    worker = _worker(day)
    too_large = Workload(prompt_tokens=1024, output_tokens=256, concurrency=100_000)
    try:
        try:
            worker.bench(day.folder(), day.space.full, too_large)
            day.note("too large", "was built")
        except UnfitMachineError as error:
            day.note("too large", f"{type(error).__name__}: {error}")
        measured = worker.bench(day.folder(), day.space.smallest, _workload(day), max_seconds=2.0)
        day.note("after it: ttft ms, tpot ms, peak bytes", _figures(measured))
    finally:
        worker.close()


def kernels(day: Day) -> None:
    """The whole model in each numerics, and INT8 with symmetric and asymmetric activations."""
    from compressor.engines import vllm
    from compressor.engines.vllm import VllmEngine

    _need_vllm()
    engine, workload = VllmEngine(day.folder()), _workload(day)
    plain = vllm.package_config
    for name, numerics, symmetric in (
        ("bf16", "bf16", True),
        ("W8A8, symmetric", "int8", True),
        ("W8A8, asymmetric", "int8", False),
        ("W4A16", "int4", True),
        ("FP8", "fp8", True),
    ):

        def config(*given: Any, symmetric: bool = symmetric, **options: Any) -> Any:
            return plain(*given, **{**options, "symmetric": symmetric})

        vllm.package_config = config  # type: ignore[assignment]
        began = time.monotonic()
        try:
            candidate = engine.build(day.whole, workload, numerics)
            try:
                measured = engine.bench(candidate, workload, max_seconds=4.0)
            finally:
                candidate.close()
            day.note(f"{name}: ttft ms, tpot ms, peak bytes", _figures(measured))
        except Exception as error:
            day.note(name, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        day.note(f"{name}: s", time.monotonic() - began)


def artefact(day: Day) -> None:
    """300 items of four choices in a package with some of the layers, read by its own process."""
    from compressor.engines.vllm_score import Prompt, Reader

    _need_vllm()
    package, subnet = _package(day)
    reader = Reader(package, "int8", subnet.to_dict(), Path(sys.executable), day.out / "kept")
    requests = _requests(day, 40 if day.rehearse else 300, 120)
    prompts: dict[tuple[int, ...], Prompt] = {}
    for request in requests:
        start = len(request.ids) - request.scored
        prompts.setdefault(request.inputs, Prompt(request.inputs, start, (request.ids[-1],)))
    tokens = sum(map(len, prompts))
    for greedy in (False, True):
        began = time.monotonic()
        reader.branches([prompts[ids] for ids in sorted(prompts)], greedy=greedy)
        seconds = time.monotonic() - began
        day.note(f"greedy {greedy}: s with start, prompts, tokens", [seconds, len(prompts), tokens])


def serving(day: Day) -> None:
    """The endpoint with that package: seconds until it answers, and one request's."""
    import urllib.request

    _need_vllm()
    package, _ = _package(day)
    began = time.monotonic()
    command = [sys.executable, "-m", "serve", str(package), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if "/v1" in line), "")
        if not line:
            raise NotRunError(f"the server ended with code {server.wait()}")
        day.note("s until it answers", time.monotonic() - began)
        url = line.split()[-1]
        name = json.load(urllib.request.urlopen(f"{url}/models"))["data"][0]["id"]
        asked = {"model": name, "prompt": [5] * 64, "max_tokens": 32, "ignore_eos": True}
        for repeat in range(3):
            began = time.monotonic()
            request = urllib.request.Request(
                f"{url}/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
            )
            json.load(urllib.request.urlopen(request, timeout=60))
            day.note(f"{repeat}: s for 64+32 tokens", time.monotonic() - began)
    finally:
        server.terminate()
        server.wait(30)


PARTS: dict[str, Callable[[Day], None]] = {
    "memory": memory,
    "scoring": scoring,
    "candidates": candidates,
    "exhausted": exhausted,
    "kernels": kernels,
    "artefact": artefact,
    "serving": serving,
}


def _need_vllm() -> None:
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise NotRunError("vLLM is not installed here")


def _worker(day: Day) -> Any:
    from compressor.engines.vllm_worker import VllmWorker

    _need_vllm()
    del day
    return VllmWorker(Path(sys.executable))


def _package(day: Day) -> tuple[Path, SubNetwork]:
    from compressor.engines.vllm_package import write_package

    layers = 4 if day.rehearse else 8
    folder = day.folder(layers)
    width = day.shape.intermediate_size
    subnet = SubNetwork(tuple(range(layers)), tuple(width // (1 + n % 2) for n in range(layers)))
    package = day.out / "package"
    if not package.is_dir():
        fields = {"name": "gpu-day", "base_model": "random"}
        write_package(folder, subnet, package, fields, symmetric=not day.rehearse)
    return package, subnet


def _workload(day: Day) -> Any:
    from compressor.profile import Workload

    if day.rehearse:
        return Workload(prompt_tokens=32, output_tokens=8, concurrency=2)
    return Workload(prompt_tokens=1024, output_tokens=128, concurrency=16)


def _requests(day: Day, items: int, shared: int) -> list[Any]:
    """Items of about 40 tokens with four choices of three, after ``shared`` tokens that all begin with."""
    import numpy as np

    from compressor.evaluation.encoding import Encoded

    draw = np.random.default_rng(0)
    highest = day.shape.vocab_size - 1
    start = draw.integers(3, highest, min(shared, 100 if day.rehearse else shared)).tolist()
    found = []
    for _ in range(items):
        context = [*start, *draw.integers(3, highest, 40).tolist()]
        found += [Encoded((*context, *draw.integers(3, highest, 3).tolist()), 3) for _ in range(4)]
    return found


def _config(shape: ModelShape, layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _random_model(config: Any, device: str) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def _used() -> int:
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _figures(measured: Any) -> list[float]:
    return [measured.ttft_ms, measured.tpot_ms, measured.peak_memory_bytes]


if __name__ == "__main__":
    sys.exit(main())
