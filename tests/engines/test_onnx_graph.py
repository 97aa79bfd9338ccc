"""A candidate's graph computes what the extracted PyTorch model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from compressor.engines.onnx_export import export
from compressor.engines.onnx_graph import FP32_ACTIVATIONS, build_graph
from compressor.engines.onnx_session import Decoder, open_session, prefill_logits
from compressor.engines.onnx_store import Export
from compressor.space import SubNetwork
from tests.conftest import make_tiny_model
from tests.engines.reference import cut, cut_quantized, logits

IDS = np.random.default_rng(0).integers(0, 512, (2, 24))

SUBNETWORKS = [
    SubNetwork((0, 1, 2, 3), (128, 128, 128, 128)),
    SubNetwork((0, 2, 3), (64, 128, 32)),
    SubNetwork((1, 3), (96, 64), (4, 8)),
    SubNetwork((2,), (32,), (4,)),
    SubNetwork((0, 1), (100, 13), (8, 4)),
]

FAMILIES = {
    "untied": {"tie_word_embeddings": False},
    "grouped": {"num_key_value_heads": 1},
    "scaled rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}


def fp32_logits(exported: Export, subnet: SubNetwork, numerics: str = "int8") -> np.ndarray:
    tensors = exported.tensors(subnet, numerics)  # type: ignore[arg-type]
    graph = build_graph(
        exported.shape, exported.constants, tensors, logits="all", accuracy_level=FP32_ACTIVATIONS
    )
    return prefill_logits(open_session(graph, exported.folder, 1), exported.shape, IDS)


@pytest.mark.parametrize("subnet", SUBNETWORKS, ids=lambda s: f"{s.layers}{s.widths}{s.bits}")
def test_a_slice_agrees_with_the_extracted_model(
    tiny_export: Export, tiny_model_folder: Path, subnet: SubNetwork
) -> None:
    reference = cut_quantized(tiny_model_folder, subnet)
    assert np.abs(fp32_logits(tiny_export, subnet) - logits(reference, IDS)).max() < 1e-3


def test_int4_rounds_every_matrix_to_four_bits(tiny_export: Export, tiny_model_folder: Path) -> None:
    subnet = SubNetwork((0, 3), (128, 64))
    four = SubNetwork(subnet.layers, subnet.widths, (4, 4), (4, 4))
    reference = cut_quantized(tiny_model_folder, four)
    assert np.abs(fp32_logits(tiny_export, subnet, "int4") - logits(reference, IDS)).max() < 1e-3


@pytest.mark.parametrize("family", ["untied", "biased llama", "qwen3"])
def test_bf16_computes_what_the_extracted_model_does(
    tiny_model_folder: Path, tmp_path: Path, family: str
) -> None:
    folder = tmp_path / "model"
    if family in FAMILIES:
        make_tiny_model(folder, **FAMILIES[family])
    else:
        make_relative(tiny_model_folder, folder, family)
    exported = export(folder, tmp_path / "export", (16,))
    subnet = SubNetwork((0, 2), (128, 50))
    reference = cut(folder, subnet)
    for matrix in (parameter for parameter in reference.parameters() if parameter.dim() == 2):
        matrix.data = matrix.data.bfloat16().float()
    assert np.abs(fp32_logits(exported, subnet, "bf16") - logits(reference, IDS)).max() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_variants_of_llama(tmp_path: Path, family: str) -> None:
    folder = make_tiny_model(tmp_path / "model", **FAMILIES[family])
    exported = export(folder, tmp_path / "export", (4, 8))
    for outer in ((8, 8), (4, 4), (8, 4)):
        if outer[0] == outer[1] or family == "untied":
            subnet = SubNetwork((0, 2), (128, 64), (8, 4), outer)
            reference = cut_quantized(folder, subnet)
            assert np.abs(fp32_logits(exported, subnet) - logits(reference, IDS)).max() < 1e-3


@pytest.mark.parametrize("family", ["biased llama", "mistral", "qwen2", "qwen3"])
def test_other_families(tiny_model_folder: Path, tmp_path: Path, family: str) -> None:
    folder = make_relative(tiny_model_folder, tmp_path / "model", family)
    exported = export(folder, tmp_path / "export", (4, 8))
    subnet = SubNetwork((0, 2), (128, 64), (8, 4))
    reference = cut_quantized(folder, subnet)
    assert np.abs(fp32_logits(exported, subnet) - logits(reference, IDS)).max() < 1e-3


def make_relative(tokenizer: Path, folder: Path, family: str) -> Path:
    """A tiny model of a family near Llama, every bias and norm random."""
    shape = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
    }
    config = {
        "biased llama": lambda: LlamaConfig(**shape, attention_bias=True, mlp_bias=True),
        "mistral": lambda: MistralConfig(**shape, sliding_window=8, tie_word_embeddings=False),
        "qwen2": lambda: Qwen2Config(**{k: v for k, v in shape.items() if k != "head_dim"}),
        "qwen3": lambda: Qwen3Config(**shape, tie_word_embeddings=True),
    }[family]()
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def test_decoding_step_by_step_gives_the_logits_of_one_pass(tiny_export: Export) -> None:
    tensors = tiny_export.tensors(SUBNETWORKS[1])
    graph = build_graph(tiny_export.shape, tiny_export.constants, tensors, accuracy_level=FP32_ACTIVATIONS)
    decoder = Decoder(open_session(graph, tiny_export.folder, 1), tiny_export.shape, len(IDS), IDS.shape[1])
    stepwise = [decoder.step(IDS[:, :10]).copy()]
    stepwise += [decoder.step(IDS[:, i : i + 1]).copy() for i in range(10, IDS.shape[1])]
    whole = fp32_logits(tiny_export, SUBNETWORKS[1])[:, 9:]
    assert np.abs(np.concatenate(stepwise, axis=1) - whole).max() < 1e-4


def test_int8_activations_stay_close(tiny_export: Export) -> None:
    for subnet in SUBNETWORKS:
        tensors = tiny_export.tensors(subnet)
        graph = build_graph(tiny_export.shape, tiny_export.constants, tensors, logits="all")
        ours = prefill_logits(open_session(graph, tiny_export.folder, 1), tiny_export.shape, IDS)
        exact = fp32_logits(tiny_export, subnet)
        assert np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()


def test_threads_of_a_session_are_at_rest_after_a_run(tiny_export: Export) -> None:
    graph = build_graph(tiny_export.shape, tiny_export.constants, tiny_export.tensors(SUBNETWORKS[0]))
    options = open_session(graph, tiny_export.folder, 2).get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_graph_is_small(tiny_export: Export) -> None:
    graph = build_graph(tiny_export.shape, tiny_export.constants, tiny_export.tensors(SUBNETWORKS[0]))
    assert len(graph.SerializeToString()) < 200_000 / 30 * 4
