"""What memory serving takes: the computed figure against the process's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.engines.memory import package_bytes, required_memory_bytes, rope_bytes
from compressor.engines.onnx_cache import cache_scales
from compressor.engines.onnx_export import export
from compressor.profile import Workload
from compressor.space import ModelShape, SubNetwork, weight_bytes

STARTER = ModelShape(576, 1536, 30, 9, 3, 64, 49152, tie_word_embeddings=True, max_position_embeddings=8192)
FULL = SubNetwork(tuple(range(30)), (1536,) * 30)
SHORT = Workload(prompt_tokens=128, output_tokens=32)

MEASURE = """
import json, sys
from pathlib import Path
from compressor.engines.memory import peak_bytes, required_memory_bytes, resident_bytes
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.profile import Workload
from compressor.space import SubNetwork

folder, kept = Path(sys.argv[1]), sys.argv[2]
layers, narrow, wide, bits, prompt, output, concurrency = map(int, sys.argv[3:])
engine = OnnxRuntimeEngine(folder, threads=2, kv_cache=kept)
widths = (narrow, (narrow + wide) // 2, wide)
subnet = SubNetwork(tuple(range(layers)), tuple(widths[i % 3] for i in range(layers)), (bits,) * layers)
workload = Workload(
    prompt_tokens=prompt, output_tokens=output, concurrency=concurrency, kv_cache=kept
)
before = resident_bytes()
runner = engine.runner(engine.build(subnet), workload)
runner.prefill()
for _ in range(output - 1):
    runner.step()
estimate = required_memory_bytes(engine.export.shape, subnet, workload)
print(json.dumps([peak_bytes() - before, estimate.total]))
"""


AGAIN = """
import json, sys
from pathlib import Path
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.profile import Workload
from compressor.space import SubNetwork

engine = OnnxRuntimeEngine(Path(sys.argv[1]), threads=2)
subnet = SubNetwork(tuple(range(12)), (1536,) * 12)
workload = Workload(prompt_tokens=32, output_tokens=4)
taken = [engine.bench(engine.build(subnet), workload, max_seconds=0.1) for _ in range(3)]
print(json.dumps([measured.peak_memory_bytes for measured in taken]))
"""


def test_the_parts_add_up() -> None:
    estimate = required_memory_bytes(STARTER, FULL, SHORT)
    assert estimate.total == estimate.weights + estimate.kv_cache + estimate.activations
    assert estimate.kv_cache == 2 * 30 * 192 * 160 * 4
    narrow = SHORT.model_copy(update={"kv_cache": "int8"})
    assert required_memory_bytes(STARTER, FULL, narrow).kv_cache == 2 * 30 * 192 * 160


def test_more_of_anything_takes_more() -> None:
    base = required_memory_bytes(STARTER, FULL, SHORT).total
    longer = SHORT.model_copy(update={"prompt_tokens": 256})
    wider = SHORT.model_copy(update={"concurrency": 2})
    half = SubNetwork(FULL.layers, (768,) * 30)
    assert required_memory_bytes(STARTER, FULL, longer).total > base
    assert required_memory_bytes(STARTER, FULL, wider).total > base
    assert required_memory_bytes(STARTER, half, SHORT).total < base
    assert required_memory_bytes(STARTER, FULL, SHORT, "int4").total < base


def test_a_package_is_its_weights_without_rotary_tables() -> None:
    assert rope_bytes(STARTER) == 2 * 8192 * 32 * 4
    assert package_bytes(STARTER, FULL) == weight_bytes(STARTER, FULL, "int8") + 32 * 4


@pytest.fixture(scope="module")
def starter_export(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exported = export(starter, tmp_path_factory.mktemp("memory") / "export", (4, 8))
    cache_scales(exported)  # here: what making them frees would be taken anew, uncounted
    return exported.folder


@pytest.mark.parametrize(
    ("kept", "layers", "narrow", "wide", "bits", "prompt", "output", "concurrency"),
    [
        ("fp32", 30, 1536, 1536, 8, 128, 16, 1),
        ("fp32", 20, 768, 768, 8, 256, 8, 2),
        ("fp32", 24, 768, 1536, 8, 256, 8, 2),
        ("fp32", 30, 1536, 1536, 4, 128, 16, 1),
        ("fp32", 24, 768, 1536, 4, 256, 8, 2),
        ("int8", 30, 1536, 1536, 8, 128, 16, 1),
        ("int8", 24, 768, 1536, 8, 512, 8, 2),
        ("int8", 20, 768, 768, 8, 64, 960, 4),
    ],
)
def test_the_estimate_is_close_to_the_measured_peak(
    starter_export: Path,
    kept: str,
    layers: int,
    narrow: int,
    wide: int,
    bits: int,
    prompt: int,
    output: int,
    concurrency: int,
) -> None:
    sizes = map(str, (layers, narrow, wide, bits, prompt, output, concurrency))
    arguments = [str(starter_export), kept, *sizes]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], check=True, capture_output=True, text=True
    )
    measured, estimated = json.loads(done.stdout)
    assert estimated == pytest.approx(measured, rel=0.05)


def test_a_second_candidate_is_charged_what_the_first_was(starter_export: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, str(starter_export)], check=True, capture_output=True, text=True
    )
    first, *later = json.loads(done.stdout)
    assert later == pytest.approx([first] * 2, rel=0.15)
