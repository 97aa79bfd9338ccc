"""vLLM packages as files: widths, numerics, bytes, refusals. Needs no vLLM."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compressor.engines import verify_package
from compressor.engines.measure import measure
from compressor.engines.source import Source
from compressor.engines.vllm_package import package_config, write_package
from compressor.engines.vllm_schemes import LARGEST_NARROW, channel_scales, quantize_channels
from compressor.engines.vllm_verify import check_engine
from compressor.engines.vllm_weights import check_tensors, plan_tensors, write_tensors
from compressor.errors import InputError, PackageError, UnfitMachineError
from compressor.manifest import check_files, read_manifest
from compressor.models import read_shape, resolve
from compressor.profile import Workload
from compressor.space import SubNetwork, parameter_count
from serve.vllm_plugin import ARCHITECTURES
from tests.conftest import make_tiny_model
from tests.vllm.conftest import FIELDS, UNEVEN


def test_layers_are_renumbered_and_cut_to_their_widths(supernet: Path, tmp_path: Path) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS, numerics="bf16")
    source = load_file(supernet / "model.safetensors")
    tensors = load_file(tmp_path / "p" / "model.safetensors")
    up, down = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(tensors[up.format(2)], source[up.format(3)][:96])
    assert torch.equal(tensors[down.format(2)], source[down.format(3)][:, :96])
    assert torch.equal(tensors[up.format(1)], source[up.format(1)][:64])
    assert not any(name.startswith("model.layers.3.") for name in tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_search_space(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    manifest = write_package(folder, UNEVEN, tmp_path / "p", FIELDS)
    shape = read_shape(resolve(str(folder)))
    assert manifest.parameters == parameter_count(shape, UNEVEN)
    stored = load_file(tmp_path / "p" / "model.safetensors")
    assert manifest.weight_bytes == sum(t.numel() * t.element_size() for t in stored.values())


def test_int8_weights_are_within_half_a_step_of_the_originals(supernet: Path, tmp_path: Path) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS)
    source = load_file(supernet / "model.safetensors")
    tensors = load_file(tmp_path / "p" / "model.safetensors")
    matrices = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    assert len(matrices) == 7 * UNEVEN.depth
    for name in matrices:
        scale = tensors[f"{name}_scale"]
        layer = int(name.split(".")[2])
        original = source[name.replace(f".{layer}.", f".{UNEVEN.layers[layer]}.")].float()
        original = original[: tensors[name].shape[0], : tensors[name].shape[1]]
        assert ((tensors[name].float() * scale - original).abs() <= scale * 0.501).all(), name


def test_a_channel_of_zeros_survives_quantization() -> None:
    weight = torch.tensor([[0.0, 0.0], [-2.0, 1.0]])
    assert channel_scales(weight).flatten().tolist() == pytest.approx([1.0, 2 / 127])
    assert quantize_channels(weight).tolist() == [[0, 0], [-127, 64]]
    assert quantize_channels(weight, LARGEST_NARROW).tolist() == [[0, 0], [-63, 31]]


def test_portable_pads_with_zeros_and_asks_for_no_plugin(supernet: Path, tmp_path: Path) -> None:
    small = write_package(supernet, UNEVEN, tmp_path / "own", FIELDS)
    padded = write_package(supernet, UNEVEN, tmp_path / "portable", FIELDS, portable=True)
    tensors = load_file(tmp_path / "portable" / "model.safetensors")
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    assert down.shape[1] == 128 and not down[:, 64:].any() and down[:, :64].any()
    config = json.loads((tmp_path / "portable" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "intermediate_sizes" not in config
    assert padded.weight_bytes > small.weight_bytes
    assert padded.parameters == small.parameters


def test_one_width_throughout_is_a_plain_llama(supernet: Path, tmp_path: Path) -> None:
    write_package(supernet, SubNetwork((0, 2), (64, 64)), tmp_path / "p", FIELDS)
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["intermediate_size"] == 64 and config["num_hidden_layers"] == 2


def test_different_widths_name_an_architecture_that_the_plugin_registers(supernet: Path) -> None:
    base = json.loads((supernet / "config.json").read_text())
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        config = package_config(base | {"model_type": family}, UNEVEN, "int8")
        assert config["architectures"][0] in ARCHITECTURES
        assert config["intermediate_sizes"] == [128, 64, 96]


def test_the_manifest_accounts_for_every_file(supernet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    written = write_package(supernet, UNEVEN, folder, FIELDS)
    manifest = read_manifest(folder)
    assert manifest == written
    assert manifest.engine == "vllm" and manifest.architecture.widths == [128, 64, 96]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest.files)
    check_files(folder, manifest)


def test_verifying_names_a_changed_byte_without_vllm(supernet: Path, tmp_path: Path) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS)
    path = tmp_path / "p" / "tokenizer.json"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackageError, match=r"tokenizer\.json is not the file"):
        list(verify_package(tmp_path / "p"))


def test_an_older_vllm_is_told_so() -> None:
    for installed in ("0.32.0", "0.32.1+cpu", "0.33.0rc1", "1.0", "unknown"):
        check_engine(installed)
    with pytest.raises(UnfitMachineError, match=r"need vLLM 0\.32, here is 0\.31\.2"):
        check_engine("0.31.2")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_where_vllm_is_missing_that_is_said(supernet: Path, tmp_path: Path) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS)
    *_, last = verify_package(tmp_path / "p")
    assert "vLLM is not installed here" in last
    with pytest.raises(UnfitMachineError, match="make setup-vllm"):
        measure(str(tmp_path / "p"), Workload(prompt_tokens=16, output_tokens=4))


def test_shards_give_the_same_bytes_as_one_file(supernet: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    shutil.copytree(supernet, tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    model = LlamaForCausalLM.from_pretrained(supernet, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one = write_package(supernet, UNEVEN, tmp_path / "one", FIELDS)
    many = write_package(tmp_path / "shards", UNEVEN, tmp_path / "many", FIELDS)
    assert one.files["model.safetensors"] == many.files["model.safetensors"]


def test_a_byte_that_changed_on_the_disk_is_found(supernet: Path, tmp_path: Path) -> None:
    entries = plan_tensors(Source(supernet), UNEVEN, "int8", tied=False)
    path = tmp_path / "model.safetensors"
    write_tensors(entries, path)
    check_tensors(entries, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackageError, match="not written as meant"):
        check_tensors(entries, path)


def test_nothing_is_left_when_writing_fails(supernet: Path, tmp_path: Path) -> None:
    too_deep = SubNetwork((0, 9), (64, 64))
    with pytest.raises(InputError, match="layer 9"):
        write_package(supernet, too_deep, tmp_path / "p", FIELDS)
    too_wide = SubNetwork((0, 1), (64, 256))
    with pytest.raises(InputError, match="width of 256"):
        write_package(supernet, too_wide, tmp_path / "p", FIELDS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused_and_kept(supernet: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "precious").write_text("kept")
    with pytest.raises(InputError, match="exists"):
        write_package(supernet, UNEVEN, tmp_path / "p", FIELDS)
    assert (tmp_path / "p" / "precious").read_text() == "kept"


def test_what_vllm_cannot_serve_is_refused(supernet: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not in 'fp16'"):
        write_package(supernet, UNEVEN, tmp_path / "p", FIELDS, numerics="fp16")
    with pytest.raises(InputError, match="8 or 4 bits"):
        write_package(supernet, replace(UNEVEN, bits=(8, 2, 8)), tmp_path / "p", FIELDS)
    narrow = replace(UNEVEN, widths=(128, 72, 96), bits=(8, 4, 8))
    with pytest.raises(InputError, match="whole groups of 32"):
        write_package(supernet, narrow, tmp_path / "p", FIELDS)


def test_a_damaged_super_network_is_named(supernet: Path, tmp_path: Path) -> None:
    shutil.copytree(supernet, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        write_package(tmp_path / "cut", UNEVEN, tmp_path / "p", FIELDS)
