"""On an NVIDIA GPU: scoring, tuning, measuring and a whole run there. Skipped where torch sees none."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from compressor.engines.energy import EnergyMeter
from compressor.engines.measure import measure
from compressor.engines.pytorch import bench_pytorch
from compressor.evaluation.scorer import PackedLM, Plan, score_plan
from compressor.evaluation.shared_layers import SharedLayers
from compressor.evaluation.tasks import load_tasks
from compressor.events import Event, Listener, StageProgress, ignore
from compressor.manifest import read_manifest
from compressor.models import shape_of_config
from compressor.profile import Workload
from compressor.space import SearchSpace, SubNetwork
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, finetune
from compressor.supernet.targets import final_states
from tests.conftest import SMALL_EFFORT, TINY_PROFILE
from tests.evaluation.test_scorer import assert_same, by_hflm, make_requests, values_of
from tests.supernet.test_finetune import KilledError, divergence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")

WORKLOAD = Workload(prompt_tokens=128, output_tokens=32, concurrency=4)
ITEMS = 60
TASKS = (("arc_easy", 0), ("winogrande", 0), ("mmlu_astronomy", 5))


@pytest.fixture(scope="module")
def tokenizer(starter: Path) -> Any:
    return AutoTokenizer.from_pretrained(starter)


@pytest.fixture(scope="module")
def requests(data_dir: Path) -> list[Any]:
    """Of the first items of three tasks: choices, contexts that differ, and shared examples."""
    made: list[Any] = []
    for name, shots in TASKS:
        task = load_tasks(name, "report", data_dir, shots)[0].task
        task.build_all_requests(limit=ITEMS)
        made += task.instances
    return made


@pytest.fixture
def exact_products() -> Iterator[None]:
    """fp32 without TF32, whatever torch's default."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to("cuda")


def load_int8(folder: Path) -> PreTrainedModel:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float16, device_map={"": 0}
    )
    return loaded.eval()


@pytest.mark.usefixtures("exact_products")
def test_scores_in_fp32_are_those_of_lm_evals_own_model(
    starter: Path, tokenizer: Any, requests: list[Any]
) -> None:
    model = load(starter, torch.float32)
    ours = PackedLM(model, tokenizer).loglikelihood(requests)
    assert_same(ours, by_hflm(model, tokenizer, requests), atol=1e-3)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("numerics", ["bfloat16", "float16", "LLM.int8"])
def test_scores_in_fewer_bits_are_as_near_to_fp32_as_lm_evals(
    starter: Path, tokenizer: Any, requests: list[Any], numerics: str
) -> None:
    """LLM.int8 finds its outliers in what is computed together, so that it rounds another way in ours."""
    exact = values_of(PackedLM(load(starter, torch.float32), tokenizer).loglikelihood(requests))
    model = load_int8(starter) if numerics == "LLM.int8" else load(starter, getattr(torch, numerics))
    ours = values_of(PackedLM(model, tokenizer).loglikelihood(requests))
    theirs = values_of(by_hflm(model, tokenizer, requests))
    assert np.abs(ours - exact).mean() < 1.2 * np.abs(theirs - exact).mean()


def test_sub_networks_share_their_first_layers_and_score_the_same(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, torch.float32)
    elastic, lm = Elastic(model), PackedLM(model, AutoTokenizer.from_pretrained(tiny_model_folder))
    plan: Plan = lm.plan_of(make_requests(24))
    shared = SharedLayers(model, lambda: elastic.active)
    for subnet in (SubNetwork((0, 1, 2, 3), (128, 64, 128, 64)), SubNetwork((0, 1, 3), (128, 64, 32))):
        with elastic.activated(subnet):
            alone, together = score_plan(plan, model), score_plan(plan, model, shared)
        np.testing.assert_allclose(together.values, alone.values, atol=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_a_tuning_in_bf16_learns_and_goes_on_from_its_checkpoint(
    tiny_model_folder: Path, tmp_path: Path, lora_rank: int
) -> None:
    config = FinetuneConfig(steps=60, batch=8, lr=3e-3, checkpoint_minutes=0, lora_rank=lora_rank)
    text = torch.randint(512, (32, 24), generator=torch.Generator().manual_seed(0))
    original = load(tiny_model_folder, torch.bfloat16)
    space = SearchSpace(shape_of_config(original.config), (2, 3, 4), (32, 64, 128))
    with torch.no_grad():
        wanted = final_states(original, text)

    def tuned(listener: Listener = ignore, folder: Path | None = None) -> float:
        """The smallest sub-network's divergence from the original after a tuning."""
        model = load(tiny_model_folder, torch.bfloat16)
        with contextlib.suppress(KilledError):
            finetune(Elastic(model), space, text, config, listener, folder=folder)
        return divergence(model, space, text, wanted)

    def kill_half_way(event: Event) -> None:
        if isinstance(event, StageProgress) and event.done == 30:
            raise KilledError

    whole = tuned()
    killed = tuned(kill_half_way, tmp_path)
    resumed = tuned(folder=tmp_path)
    assert whole < 0.9 * divergence(original, space, text, wanted)
    assert resumed < killed and resumed == pytest.approx(whole, rel=0.1)


def test_a_model_is_measured_on_the_gpu_with_its_allocators_peak(starter: Path) -> None:
    measured = measure(str(starter), WORKLOAD, max_seconds=1, on="cuda")
    assert measured.ttft_ms > 0 and measured.tpot_ms > 0
    assert measured.conditions["provider"].startswith("cuda")
    assert measured.conditions["device"] == torch.cuda.get_device_name()
    model = load(starter, torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    cache = 2 * 2 * 4 * 160 * config.num_hidden_layers * config.num_key_value_heads * 64
    assert weights + cache < measured.peak_memory_bytes < weights + cache + 2**29


def test_a_narrower_shallower_model_takes_less_of_the_gpu(starter: Path) -> None:
    model = load(starter, torch.bfloat16)
    whole = bench_pytorch(model, WORKLOAD, max_seconds=1)
    with Elastic(model).activated(SubNetwork(tuple(range(12)), (512,) * 12)):
        small = bench_pytorch(model, WORKLOAD, max_seconds=1)
    assert small.tpot_ms < 0.7 * whole.tpot_ms
    assert small.peak_memory_bytes < whole.peak_memory_bytes


def test_the_gpus_energy_is_counted() -> None:
    pytest.importorskip("pynvml")
    meter = EnergyMeter()
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(200):
        a @ a
    torch.cuda.synchronize()
    joules = meter.joules()
    assert joules is None or joules > 1


def test_a_run_tunes_and_scores_on_the_gpu_and_packages_for_the_cpu(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    profile, run = tmp_path / "tiny.toml", tmp_path / "run"
    profile.write_text(TINY_PROFILE)
    command = [sys.executable, "-m", "compressor.cli", "--model", str(tiny_model_folder), "--run", str(run)]
    result = subprocess.run(
        [*command, "--profile", str(profile), *SMALL_EFFORT], capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    assert read_manifest(run / "package").engine == "onnxruntime"
