"""The plain ONNX graph that optimum exports, in its own environment (transformers 4.57)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from compressor.engines.hf_folder import write_hf_folder
from compressor.space import SubNetwork
from tests.engines.reference import cut

pytestmark = pytest.mark.optimum

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-optimum" / "bin" / "python"
UNEVEN = SubNetwork((0, 1, 3), (128, 64, 96))
UNIFORM = SubNetwork((0, 2), (64, 64))
PROMPT = [5, 17, 301, 44, 9]
RUN = """
import json, sys
import torch, transformers
folder, kind, ids = sys.argv[1], sys.argv[2], torch.tensor([json.loads(sys.argv[3])])
if kind == "onnx":
    from optimum.onnxruntime import ORTModelForCausalLM
    model = ORTModelForCausalLM.from_pretrained(folder)
else:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
mask = torch.ones_like(ids)
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=mask).logits[0]
text = model.generate(
    input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
)
answer = [transformers.__version__, logits.tolist(), text[0].tolist(), tokenizer("12 words").input_ids]
print(json.dumps(answer))
"""


@pytest.fixture(scope="module", params=[UNEVEN, UNIFORM], ids=["widths", "one width"])
def written(
    request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, SubNetwork]:
    """A sub-network's Hugging Face folder, the ONNX folder that optimum makes of it, and which it is."""
    if not PYTHON.is_file():
        pytest.fail("optimum is not installed: make setup-optimum")
    folder = tmp_path_factory.mktemp("optimum")
    write_hf_folder(tiny_model_folder, request.param, folder / "hf", {"name": "tiny", "base_model": "x"})
    command = ["-m", "compressor.engines.optimum_export", str(folder / "hf"), str(folder / "onnx")]
    done = subprocess.run(
        [str(PYTHON), *command], capture_output=True, text=True, cwd=ROOT, env=_environment(folder)
    )
    assert done.returncode == 0, done.stderr
    return folder / "hf", folder / "onnx", request.param


@pytest.mark.parametrize("kind", ["onnx", "hf"])
@torch.no_grad()
def test_it_computes_what_the_sub_network_does(
    written: tuple[Path, Path, SubNetwork], tiny_model_folder: Path, kind: str
) -> None:
    hf, onnx, subnet = written
    folder = onnx if kind == "onnx" else hf
    command = [str(PYTHON), "-c", RUN, str(folder), kind, json.dumps(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=hf.parent, env=_environment(hf.parent))
    assert done.returncode == 0, done.stderr
    version, logits, text, ids = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("4.57")
    model = cut(tiny_model_folder, subnet)
    assert torch.allclose(torch.tensor(logits), model(torch.tensor([PROMPT])).logits[0], atol=1e-3)
    ours = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert text == ours[0].tolist() and len(ids) > 2


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
