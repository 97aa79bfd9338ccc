"""Packages with layers of 8 and 4 bits, of 4 bits throughout, and in FP8, by themselves and in vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.engines.memory import shipped_weight_bytes
from compressor.engines.quantize import Quantized, quantize_evenly
from compressor.engines.vllm_package import package_config, write_package
from compressor.engines.vllm_schemes import (
    GROUP_SCALE,
    dequantize_groups,
    fp8_scales,
    quantization_config,
    quantize_fp8,
    quantize_groups,
    schemes,
)
from compressor.manifest import read_manifest
from compressor.models import read_shape, resolve
from compressor.space import SubNetwork
from tests.vllm.conftest import FIELDS, UNEVEN

MIXED = replace(UNEVEN, bits=(8, 4, 8))
FORMS = [(MIXED, "int8"), (UNEVEN, "int4"), (UNEVEN, "fp8"), (UNEVEN, "int8")]
PREDICTED = [pytest.param(form, marks=pytest.mark.slow) for form in FORMS[:3]]
"""Still to be seen passing, so they hold up nobody; those of 4 bits want a vLLM for CPUs with AVX-512."""


def test_packed_weights_are_those_of_our_blocks_bit_for_bit() -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    packed, scales = quantize_groups(weight)
    ours = quantize_evenly(weight, 4)
    ours = Quantized(ours.integers, ours.scales.to(GROUP_SCALE), None, 4)
    assert packed.shape == (24, 96 // 8) and scales.dtype == GROUP_SCALE
    assert torch.equal(dequantize_groups(packed, scales), ours.values(weight.shape[1]))


def test_packed_weights_are_what_the_format_unpacks() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    packed, scales = quantize_groups(weight)
    theirs = unpack_from_int32(packed, 4, torch.Size((8, 64))).float()
    assert torch.equal(theirs * scales.float().repeat_interleave(32, 1), dequantize_groups(packed, scales))


def test_fp8_weights_are_within_a_step_of_the_originals() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    back = quantize_fp8(weight).float() * fp8_scales(weight)
    assert ((back - weight).abs() <= weight.abs() / 16 + fp8_scales(weight) / 512).all()
    assert quantize_fp8(torch.zeros(2, 4)).float().abs().max() == 0


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("portable", [False, True])
def test_bytes_are_those_that_the_search_counts(
    supernet: Path, tmp_path: Path, form: tuple[SubNetwork, str], portable: bool
) -> None:
    subnet, numerics = form
    manifest = write_package(supernet, subnet, tmp_path / "p", FIELDS, numerics=numerics, portable=portable)
    shape = read_shape(resolve(str(supernet)))
    counted = replace(subnet, widths=(max(subnet.widths),) * 3) if portable else subnet
    assert manifest.weight_bytes == shipped_weight_bytes(shape, counted, numerics, "vllm")  # type: ignore[arg-type]
    assert read_manifest(tmp_path / "p").numerics == numerics


def test_each_layer_is_of_the_group_of_its_bits(supernet: Path, tmp_path: Path) -> None:
    import re

    write_package(supernet, MIXED, tmp_path / "p", FIELDS)
    tensors = load_file(tmp_path / "p" / "model.safetensors")
    config = json.loads((tmp_path / "p" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    for layer, bits in enumerate(MIXED.bits):
        name = f"model.layers.{layer}.self_attn.qkv_proj"
        (group,) = [
            g for g in config["config_groups"].values() if re.match(g["targets"][0].removeprefix("re:"), name)
        ]
        assert group["weights"]["num_bits"] == bits
        assert (group["input_activations"] is None) == (bits == 4)
        stem = f"model.layers.{layer}.mlp.down_proj.weight"
        assert (f"{stem}_packed" in tensors) == (bits == 4) and (stem in tensors) == (bits == 8)


def test_activations_are_symmetric_on_gpus_alone() -> None:
    for symmetric in (False, True):
        config = quantization_config(UNEVEN, "int8", symmetric)
        assert config is not None
        assert config["config_groups"]["group_0"]["input_activations"]["symmetric"] is symmetric


def test_what_compiled_code_is_filed_under_differs_by_widths_and_bits(supernet: Path) -> None:
    pytest.importorskip("vllm")
    base = json.loads((supernet / "config.json").read_text())
    subnets = [UNEVEN, MIXED, replace(MIXED, bits=(4, 8, 8)), replace(UNEVEN, widths=(128, 96, 64))]
    assert len({_hash(supernet, package_config(base, subnet, "int8")) for subnet in subnets}) == len(subnets)


def _hash(folder: Path, config: dict[str, Any]) -> str:
    from vllm.engine.arg_utils import EngineArgs

    options: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True}
    return str(EngineArgs(str(folder), hf_overrides=config, **options).create_engine_config().compute_hash())


@pytest.mark.vllm
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("form", PREDICTED, ids=str)
def test_vllm_predicts_what_the_packaged_weights_do(
    supernet: Path, tmp_path: Path, form: tuple[SubNetwork, str], portable: bool
) -> None:
    """The likeliest tokens of vLLM beside those of the model with our rounded weights put in its place."""
    import sys

    from compressor.engines.vllm_score import Prompt, Reader

    pytest.importorskip("vllm")
    subnet, numerics = form
    if "int4" in schemes(subnet, numerics) and not _multiplies_four_bits():  # type: ignore[arg-type]
        pytest.skip("this vLLM has no product of 4-bit weights for this CPU: it wants AVX-512")
    package = tmp_path / "p"
    write_package(supernet, subnet, package, FIELDS, numerics=numerics, portable=portable)
    ids = tuple(torch.randint(3, 500, (48,), generator=torch.Generator().manual_seed(1)).tolist())
    reader = Reader(package, numerics, subnet.to_dict(), Path(sys.executable), tmp_path / "kept")
    (found,) = reader.branches([Prompt(ids, 1, (7,))], greedy=False)
    expected = _log_likelihoods(supernet, package, subnet, ids)
    assert found.inside.tolist() == pytest.approx(expected, abs=0.25), "INT8 inputs and bf16 take their part"


def _multiplies_four_bits() -> bool:
    """Whether vLLM's library for this CPU has the kernel."""
    import vllm._custom_ops  # noqa: F401

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def _log_likelihoods(supernet: Path, package: Path, subnet: SubNetwork, ids: tuple[int, ...]) -> list[float]:
    from transformers import AutoModelForCausalLM

    from compressor.supernet.extraction import extract

    whole = AutoModelForCausalLM.from_pretrained(supernet, dtype=torch.float32)
    model = extract(whole, replace(subnet, bits=()))
    stored = load_file(package / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{name}_packed" in stored:
                value = dequantize_groups(stored[f"{name}_packed"], stored[f"{name}_scale"])
            elif f"{name}_scale" in stored:
                value = stored[name].float() * stored[f"{name}_scale"]
            else:
                value = stored[name].float()
            parameter.copy_(value[tuple(slice(size) for size in parameter.shape)])
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(rows[i, token]) for i, token in enumerate(ids[1:])]
