"""vLLM serves our packages: the same answers as transformers, with the plugin, padded, and over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from compressor import cpu
from compressor.engines import verify_package
from compressor.engines.vllm_package import write_package
from compressor.engines.vllm_score import Reader
from compressor.errors import PackageError, UnfitMachineError
from compressor.space import SubNetwork
from tests.conftest import make_tiny_model
from tests.vllm.conftest import FIELDS, UNEVEN

pytestmark = pytest.mark.vllm

PROMPTS = ([1, 50, 60, 70, 80], [1, 300, 301, 302], list(range(100, 140)))
NEW_TOKENS = 16
API_KEY = "sesame"


@dataclass(frozen=True)
class Answers:
    """Of each prompt: the greedy continuation, and the log-probability of each prompt token but the first."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> None:
    pytest.importorskip("vllm")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.mark.parametrize("portable", [False, True], ids=["plugin", "portable"])
def test_full_precision_answers_like_transformers(supernet: Path, tmp_path: Path, portable: bool) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS, numerics="fp32", portable=portable)
    expected, found = _transformers(supernet, UNEVEN), _vllm(tmp_path / "p")
    assert all(len(set(tokens)) > 4 for tokens in expected.tokens)
    assert found.tokens == expected.tokens
    assert _largest_gap(found, expected) < 1e-3


@pytest.mark.parametrize("portable", [False, True], ids=["plugin", "portable"])
def test_int8_stays_close_to_full_precision(supernet: Path, tmp_path: Path, portable: bool) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS, portable=portable, narrow=cpu.this_saturates())
    expected, found = _transformers(supernet, UNEVEN), _vllm(tmp_path / "p")
    gaps = [abs(a - b) for a, b in _pairs(found, expected)]
    spread = torch.tensor([value for row in expected.logprobs for value in row]).std().item()
    assert sum(gaps) / len(gaps) < 0.1 * spread
    assert all(len(tokens) == NEW_TOKENS for tokens in found.tokens)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_answer_like_transformers(tmp_path: Path, family: str) -> None:
    folder = _tiny_of_family(tmp_path / "model", family)
    write_package(folder, UNEVEN, tmp_path / "p", FIELDS, numerics="fp32")
    expected, found = _transformers(folder, UNEVEN), _vllm(tmp_path / "p")
    assert found.tokens == expected.tokens
    assert _largest_gap(found, expected) < 1e-3


def test_verifying_speaks_and_names_a_changed_file(supernet: Path, tmp_path: Path) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS)
    lines = list(verify_package(tmp_path / "p"))
    assert lines[0].endswith("files are as they were packaged") and "->" in lines[-1]
    path = tmp_path / "p" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackageError, match=r"model\.safetensors is not the file"):
        list(verify_package(tmp_path / "p"))


@pytest.fixture(scope="module")
def served(
    supernet: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The base address of a running server with an uneven INT8 package, and the launcher's process."""
    folder = tmp_path_factory.mktemp("served") / "package"
    write_package(supernet, UNEVEN, folder, FIELDS)
    command = [sys.executable, "-m", "serve", str(folder), "--port", "0", "--api-key", API_KEY]
    command += ["--max-concurrency", "2", "--drain-seconds", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "answers at" in line, line
            yield line.split()[-1], process
        finally:
            process.terminate()
            process.wait(60)


def test_a_chat_through_the_launcher(served: tuple[str, subprocess.Popen]) -> None:
    from openai import AuthenticationError, OpenAI

    url, _ = served
    with OpenAI(base_url=url, api_key=API_KEY) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        messages = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert 1 <= answer.usage.completion_tokens <= 5
    with OpenAI(base_url=url, api_key="wrong") as client, pytest.raises(AuthenticationError):
        client.models.list()


def test_sigterm_stops_the_server_and_leaves_nothing(served: tuple[str, subprocess.Popen]) -> None:
    url, process = served
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=1).close()
        except (urllib.error.URLError, ConnectionError):
            return
        time.sleep(0.1)
    pytest.fail("the server still answers")


def test_scoring_gives_the_sub_networks_own_predictions(supernet: Path, tmp_path: Path) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS, numerics="fp32")
    reader = Reader(tmp_path / "p", "fp32", UNEVEN.to_dict(), Path(sys.executable), tmp_path / "kept")
    expected = _transformers(supernet, UNEVEN)
    for top, prompt, tokens in zip(reader.tops(PROMPTS), PROMPTS, expected.tokens, strict=True):
        assert len(top) == len(prompt) and top[-1] == tokens[0]


def test_a_package_that_vllm_cannot_load_is_said_to_be_unscored(supernet: Path, tmp_path: Path) -> None:
    write_package(supernet, UNEVEN, tmp_path / "p", FIELDS)
    (tmp_path / "p" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnfitMachineError, match="could not score the package"):
        Reader(tmp_path / "p", "int8", UNEVEN.to_dict(), Path(sys.executable), tmp_path / "kept").tops(
            [[1, 2, 3]]
        )


def _vllm(package: Path) -> Answers:
    from vllm import LLM, SamplingParams

    dtype = json.loads((package / "config.json").read_text())["dtype"]  # "auto" would turn fp32 into bf16
    llm = LLM(
        str(package),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=32 << 20,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    logprobs = [
        [
            entry[token].logprob
            for entry, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)
        ]
        for o in outputs
    ]
    return Answers([list(o.outputs[0].token_ids) for o in outputs], logprobs)


def _transformers(folder: Path, subnet: SubNetwork) -> Answers:
    """The same from transformers, with the layers and neurons cut out by hand."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = torch.nn.ModuleList(model.model.layers[i] for i in subnet.layers)
    for index, (layer, width) in enumerate(zip(layers, subnet.widths, strict=True)):
        layer.self_attn.layer_idx = index
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight = torch.nn.Parameter(projection.weight[:width])
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, :width])
    model.model.layers = layers
    model.config.num_hidden_layers = subnet.depth
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
            text = model.generate(
                ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
            )
        tokens.append(text[0, len(prompt) :].tolist())
        logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return Answers(tokens, logprobs)


def _tiny_of_family(folder: Path, family: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    make_tiny_model(folder, head_dim=32, hidden_size=128, initializer_range=0.15, tie_word_embeddings=False)
    base = LlamaConfig.from_pretrained(folder).to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        base.pop(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **base)).save_pretrained(folder)
    return folder


def _pairs(one: Answers, other: Answers) -> Iterator[tuple[float, float]]:
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        yield from zip(mine, theirs, strict=True)


def _largest_gap(one: Answers, other: Answers) -> float:
    return max(abs(a - b) for a, b in _pairs(one, other))
