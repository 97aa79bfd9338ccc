"""Candidates in vLLM: made-up weights, widths of their own, one after the other in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.engines.measure import measure
from compressor.engines.vllm import VllmEngine, execution
from compressor.engines.vllm_package import write_package
from compressor.errors import InputError
from compressor.profile import Workload
from compressor.space import SubNetwork
from tests.vllm.conftest import FIELDS, UNEVEN

pytestmark = pytest.mark.vllm

WORKLOAD = Workload(prompt_tokens=32, output_tokens=8, concurrency=2)
FULL = SubNetwork((0, 1, 2, 3), (128,) * 4)


@pytest.fixture(autouse=True, scope="module")
def _needs_vllm() -> None:
    pytest.importorskip("vllm")


def test_candidates_are_built_and_measured_one_after_the_other(supernet: Path) -> None:
    engine = VllmEngine(supernet)
    for subnet in (FULL, UNEVEN):
        candidate = engine.build(subnet, WORKLOAD)
        try:
            layers = candidate.llm.apply_model(_widths)[0]
            measured = engine.bench(candidate, WORKLOAD, max_seconds=5)
        finally:
            candidate.close()
        assert layers == list(subnet.widths)
        assert measured.ttft_ms > 0 and measured.tpot_ms > 0 and measured.repeats >= 3
        assert measured.ttft_p90_ms >= measured.ttft_ms
        assert measured.conditions["engine"].startswith("vllm 0.")
        assert measured.conditions["numerics"] == "int8"
        rounds_s = (measured.ttft_ms + 7 * measured.tpot_ms) / 1e3
        assert measured.throughput_tok_s == pytest.approx(2 * 8 / rounds_s, rel=1e-3)


def test_a_gpu_replays_graphs_and_compiles_nothing(supernet: Path) -> None:
    import torch
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import EngineArgs

    options = execution(WORKLOAD, "bfloat16", on_cuda=True)
    config = EngineArgs(str(supernet), skip_tokenizer_init=True, **options).create_engine_config()
    assert config.compilation_config.mode == CompilationMode.NONE
    assert not config.model_config.enforce_eager
    assert config.model_config.dtype == torch.bfloat16
    assert options["compilation_config"]["cudagraph_capture_sizes"] == [WORKLOAD.concurrency]


def test_a_package_is_measured_in_vllm(supernet: Path, tmp_path: Path) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS)
    measured = measure(str(tmp_path / "p"), WORKLOAD, max_seconds=0.5)
    assert measured.ttft_ms > 0 and measured.tpot_ms > 0
    assert measured.conditions["engine"].startswith("vllm 0.")


def test_what_vllm_cannot_serve_is_refused(supernet: Path) -> None:
    engine = VllmEngine(supernet)
    with pytest.raises(InputError, match="fp16"):
        engine.build(UNEVEN, WORKLOAD, "fp16")
    with pytest.raises(InputError, match="context"):
        engine.build(UNEVEN, Workload(prompt_tokens=600, output_tokens=8))


def _widths(model: object) -> list[int]:
    return [layer.mlp.down_proj.input_size for layer in model.model.layers]  # type: ignore[attr-defined]
