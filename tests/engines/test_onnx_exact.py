"""Two passes over INT8 inputs compute what fp32 inputs do, and only as many matrices take them as need be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from compressor.engines.onnx_exact import choose_exactness
from compressor.engines.onnx_export import export
from compressor.engines.onnx_graph import FP32_ACTIVATIONS, INT8_ACTIVATIONS, build_graph
from compressor.engines.onnx_session import Decoder, open_session, prefill_logits
from compressor.engines.onnx_store import Export
from compressor.engines.onnx_verify import mean_kl
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.space import SubNetwork
from tests.engines.reference import cut, logits
from tests.engines.test_onnx_graph import make_relative

IDS = np.random.default_rng(0).integers(0, 512, (2, 24))
SUBNET = SubNetwork((0, 2, 3), (128, 64, 128))
NAMES = ("qkv", "o", "gate", "up", "down")
EVERYTHING = ("head", *(f"layers.{layer}.{name}" for layer in range(3) for name in NAMES))


def computed(
    exported: Export, fine_inputs: Sequence[str], accuracy_level: int = INT8_ACTIVATIONS, last: bool = False
) -> np.ndarray:
    graph = build_graph(
        exported.shape,
        exported.constants,
        exported.tensors(SUBNET),
        logits="last" if last else "all",
        accuracy_level=accuracy_level,
        fine_inputs=fine_inputs,
    )
    return prefill_logits(open_session(graph, exported.folder, 1), exported.shape, IDS)


@pytest.mark.parametrize("family", ["llama", "biased llama", "qwen3"])
def test_two_passes_everywhere_compute_what_fp32_inputs_do(
    tiny_export: Export, tiny_model_folder: Path, tmp_path: Path, family: str
) -> None:
    exported = tiny_export
    if family != "llama":
        exported = export(make_relative(tiny_model_folder, tmp_path / "model", family), tmp_path / "export")
    exact = computed(exported, (), FP32_ACTIVATIONS)
    one, two = (np.abs(computed(exported, names) - exact).max() for names in ((), EVERYTHING))
    assert two < one / 30
    last = computed(exported, EVERYTHING, last=True)
    assert np.abs(last - exact[:, -1:]).max() < one / 30


def test_decoding_in_two_passes_gives_the_logits_of_a_whole_prompt(tiny_export: Export) -> None:
    engine = OnnxRuntimeEngine(tiny_export.folder, threads=1)
    candidate = engine.build(SUBNET, fine_inputs=EVERYTHING)
    decoder = Decoder(candidate.session, tiny_export.shape, len(IDS), IDS.shape[1])
    decoder.step(IDS[:, :20])
    steps = [decoder.step(IDS[:, i : i + 1]).copy() for i in range(20, 24)]
    whole = engine.logits(candidate, IDS)[:, 20:]
    assert np.abs(np.concatenate(steps, axis=1) - whole).max() < 1e-2


def test_only_as_many_matrices_are_chosen_as_the_target_asks_for(
    tiny_export: Export, tiny_model_folder: Path
) -> None:
    engine = OnnxRuntimeEngine(tiny_export.folder, threads=1)
    expected = logits(cut(tiny_model_folder, SUBNET), IDS)
    asked: list[tuple[str, ...]] = []

    def divergence(fine_inputs: Sequence[str]) -> float:
        asked.append(tuple(fine_inputs))
        return mean_kl(expected, engine.logits(engine.build(SUBNET, fine_inputs=fine_inputs), IDS))

    plain, floor = divergence(()), divergence(EVERYTHING)
    assert floor < plain
    shape = tiny_export.shape
    asked.clear()
    enough = choose_exactness(shape, SUBNET, divergence, plain)
    assert enough.fine_inputs == () and enough.divergence_nats == plain and asked == [()]
    target = (plain + floor) / 2
    chosen = choose_exactness(shape, SUBNET, divergence, target)
    assert 0 < len(chosen.fine_inputs) < len(EVERYTHING)
    assert set(chosen.fine_inputs) < set(EVERYTHING)
    assert chosen.divergence_nats == divergence(chosen.fine_inputs) <= target
    beyond = choose_exactness(shape, SUBNET, divergence, floor / 2)
    assert beyond.fine_inputs == () and beyond.divergence_nats == plain


def test_layers_of_four_bits_are_brought_within_the_bound_too(tiny_export: Export) -> None:
    four = SubNetwork(SUBNET.layers, SUBNET.widths, (8, 4, 8))

    def divergence(names: Sequence[str]) -> float:
        return 0.01 if "layers.1.o" in names else 0.4

    found = choose_exactness(tiny_export.shape, four, divergence, 0.02)
    assert "layers.1.o" in found.fine_inputs and found.divergence_nats == 0.01


def test_inputs_that_are_no_whole_blocks_are_left_out(tiny_export: Export) -> None:
    ragged = SubNetwork((0, 1), (100, 128))
    asked: list[Sequence[str]] = []

    def divergence(names: Sequence[str]) -> float:
        asked.append(names)
        return 0.01 if "layers.1.down" in names else 0.05

    chosen = choose_exactness(tiny_export.shape, ragged, divergence, 0.02)
    assert chosen.fine_inputs == ("layers.1.down",) and chosen.divergence_nats == 0.01
    assert not any("layers.0.down" in names for names in asked)
    with pytest.raises(ValueError, match=r"layers\.0\.down has 100 inputs"):
        build_graph(
            tiny_export.shape,
            tiny_export.constants,
            tiny_export.tensors(ragged),
            fine_inputs=("layers.0.down",),
        )
