"""Sub-networks as Hugging Face folders: what transformers loads in a process that lacks this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressor.engines.hf_folder import write_hf_folder
from compressor.errors import InputError
from compressor.models import read_shape, resolve
from compressor.space import SubNetwork, parameter_count
from tests.engines.reference import cut

UNIFORM = SubNetwork((0, 2), (64, 64))
UNEVEN = SubNetwork((0, 1, 3), (128, 64, 96))
FIELDS = {"name": "tiny", "base_model": "random-llama", "license": "apache-2.0"}
IDS = list(range(3, 40))
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids = sys.argv[1], json.loads(sys.argv[2])
sys.modules["compressor"] = None
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0]
print(json.dumps([logits.tolist(), tokenizer("12 words").input_ids, type(model).__name__]))
"""


@pytest.mark.parametrize("subnet", [UNIFORM, UNEVEN], ids=["one width", "widths"])
def test_transformers_alone_computes_the_sub_networks_logits(
    tiny_model_folder: Path, tmp_path: Path, subnet: SubNetwork
) -> None:
    folder = tmp_path / "sub"
    write_hf_folder(tiny_model_folder, subnet, folder, FIELDS)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", LOAD, str(folder), json.dumps(IDS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    logits, ids, name = json.loads(done.stdout.splitlines()[-1])
    expected = cut(tiny_model_folder, subnet)(torch.tensor([IDS])).logits[0]
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)
    assert len(ids) > 2
    assert name == ("LlamaForCausalLM" if subnet is UNIFORM else "ElasticLlamaForCausalLM")


def test_a_folder_is_no_larger_than_its_parameters(tiny_model_folder: Path, tmp_path: Path) -> None:
    write_hf_folder(tiny_model_folder, UNEVEN, tmp_path / "sub", FIELDS)
    parameters = parameter_count(read_shape(resolve(str(tiny_model_folder))), UNEVEN)
    header_bytes = 16_384
    assert (tmp_path / "sub" / "model.safetensors").stat().st_size < 2 * parameters + header_bytes


def test_only_different_widths_need_code_of_ours(tiny_model_folder: Path, tmp_path: Path) -> None:
    write_hf_folder(tiny_model_folder, UNIFORM, tmp_path / "plain", FIELDS)
    write_hf_folder(tiny_model_folder, UNEVEN, tmp_path / "uneven", FIELDS)
    plain, uneven = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("plain", "uneven"))
    assert plain["model_type"] == "llama" and "auto_map" not in plain
    assert not (tmp_path / "plain" / "modeling_elastic.py").exists()
    assert uneven["per_layer_config"]["1"] == {"intermediate_size": 64}
    assert uneven["intermediate_sizes"] == [128, 64, 96]
    assert uneven["rope_theta"] == uneven["rope_parameters"]["rope_theta"]
    card = (tmp_path / "uneven" / "README.md").read_text()
    assert "license: apache-2.0" in card and "trust_remote_code=True" in card


def test_what_cannot_be_written_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bf16 or fp32"):
        write_hf_folder(tiny_model_folder, UNIFORM, tmp_path / "x", FIELDS, numerics="int8")
    with pytest.raises(InputError, match="layer 9"):
        write_hf_folder(tiny_model_folder, SubNetwork((9,), (64,)), tmp_path / "x", FIELDS)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists"):
        write_hf_folder(tiny_model_folder, UNIFORM, tmp_path / "there", FIELDS)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
