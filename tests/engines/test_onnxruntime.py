"""The ONNX Runtime engine on a tiny model: building, scoring, measuring."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from compressor.engines.onnx_store import Export
from compressor.engines.onnx_verify import mean_kl
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.errors import InputError, UnfitMachineError
from compressor.profile import Workload
from compressor.space import SubNetwork

FULL = SubNetwork((0, 1, 2, 3), (128,) * 4)
SMALL = SubNetwork((0, 3), (64, 32), (4, 8))
WORKLOAD = Workload(prompt_tokens=32, output_tokens=8, concurrency=2)


@pytest.fixture(scope="module")
def engine(tiny_export: Export) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(tiny_export.folder, threads=1)


def test_a_measurement_says_how_it_was_taken(engine: OnnxRuntimeEngine) -> None:
    measured = engine.bench(engine.build(SMALL), WORKLOAD, max_seconds=0.2)
    assert measured.ttft_ms > 0 and measured.tpot_ms > 0 and measured.repeats >= 3
    assert measured.ttft_p90_ms >= measured.ttft_ms
    assert measured.conditions["provider"] == "CPUExecutionProvider"
    assert measured.conditions["threads"] == 1
    assert measured.conditions["engine"].startswith("onnxruntime 1.")


def test_fewer_layers_are_faster_than_the_reference(engine: OnnxRuntimeEngine) -> None:
    candidate, reference = engine.build(SubNetwork((0,), (32,))), engine.build(FULL)
    measured = engine.bench_against(candidate, reference, WORKLOAD, max_seconds=1.0)
    assert measured.conditions["tpot_ratio"] < 0.9
    assert measured.conditions["reference_ttft_ms"] > 0


def test_logits_do_not_depend_on_the_batch(engine: OnnxRuntimeEngine) -> None:
    candidate = engine.build(SMALL)
    ids = np.random.default_rng(0).integers(0, 512, (3, 400))
    together = engine.logits(candidate, ids)
    assert together.shape == (3, 400, 512) and together.dtype == np.float32
    assert np.abs(engine.logits(candidate, ids[1]) - together[1]).max() < 1e-4
    assert np.array_equal(engine.top1(candidate, ids), together.argmax(-1))


def test_an_int8_cache_predicts_alike_at_once_and_token_by_token(tiny_export: Export) -> None:
    wide, narrow = (
        OnnxRuntimeEngine(tiny_export.folder, threads=1, kv_cache=kept) for kept in ("fp32", "int8")
    )
    ids = np.random.default_rng(0).integers(0, 512, 60)
    exact = wide.logits(wide.build(SMALL), ids)
    candidate = narrow.build(SMALL)
    at_once, decoded = narrow.logits(candidate, ids), narrow.decoded_logits(candidate, ids, 20)
    assert at_once.shape == exact.shape and decoded.shape == (41, 512)
    assert mean_kl(exact, at_once) < 0.01 and mean_kl(exact[19:], decoded) < 0.01
    batch = np.stack([ids, ids[::-1]])
    assert np.abs(narrow.logits(candidate, batch)[0] - at_once).max() < 1e-4
    measured = narrow.bench(candidate, WORKLOAD, max_seconds=0.1)
    assert measured.conditions["kv_cache"] == "int8"
    assert "kv_cache" not in wide.bench(wide.build(SMALL), WORKLOAD, max_seconds=0.1).conditions


def test_a_workload_longer_than_the_context_is_refused(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(InputError, match="context"):
        engine.bench(engine.build(SMALL), Workload(prompt_tokens=500, output_tokens=100))


def test_layers_the_model_lacks_are_refused(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(InputError, match="4 layers"):
        engine.build(SubNetwork((0, 7), (128, 128)))


def test_where_each_node_really_ran_is_told(engine: OnnxRuntimeEngine) -> None:
    placement = engine.placement(SMALL)
    assert set(placement) == {"CPUExecutionProvider"}
    assert placement["CPUExecutionProvider"] > 2 * SMALL.depth


def test_a_provider_that_falls_back_to_the_cpu_is_found_out(tiny_export: Export) -> None:
    if "AzureExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no provider that leaves every node to the CPU")
    elsewhere = OnnxRuntimeEngine(tiny_export.folder, threads=1, provider="AzureExecutionProvider")
    measured = elsewhere.bench(elsewhere.build(SMALL), WORKLOAD, max_seconds=0.2)
    assert set(measured.conditions["nodes"]) == {"CPUExecutionProvider"}
    assert any("fell back to the CPU" in reason for reason in measured.conditions["unfit"])


def test_a_provider_that_is_not_there_is_named(tiny_export: Export) -> None:
    elsewhere = OnnxRuntimeEngine(tiny_export.folder, provider="CUDAExecutionProvider")
    with pytest.raises(UnfitMachineError, match="CUDAExecutionProvider"):
        elsewhere.build(SMALL)
