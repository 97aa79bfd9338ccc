"""Proof that a vLLM package loads and speaks, where vLLM is installed; elsewhere that is said."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.version import Version

from compressor.engines import served
from compressor.engines.vllm import UNKNOWN, VllmEngine, vllm_version
from compressor.environments import REMEDY
from compressor.errors import PackageError, UnfitMachineError
from compressor.manifest import Manifest
from compressor.profile import Workload
from compressor.space import SubNetwork

OLDEST_VLLM = "0.32"
"""The first vLLM whose interfaces the plugin for per-layer widths was written against."""
PROMPTS = ("The capital of France is", "def add(a, b):", "Once upon a time")
PROMPT_TOKENS = 64
CONTINUATION_TOKENS = 12


def speak(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Load a package and continue a few prompts greedily, one line each.

    Raises ``PackageError`` for one that computes no finite probabilities, and ``UnfitMachineError``
    where vLLM is too old or cannot load it.
    """
    yield from served.prove(folder, served.read_vocabulary(folder))
    if importlib.util.find_spec("vllm") is None:
        yield f"vLLM is not installed here, so its answers were not tried: {REMEDY}"
        return
    check_engine(vllm_version())
    room = min(PROMPT_TOKENS, manifest.context_length - CONTINUATION_TOKENS)
    workload = Workload(prompt_tokens=room, output_tokens=CONTINUATION_TOKENS, concurrency=len(PROMPTS))
    subnet = SubNetwork.from_dict(manifest.architecture.model_dump())
    candidate = VllmEngine(folder).open_package(subnet, workload, manifest.numerics)
    try:
        yield f"vLLM {vllm_version()} loads {subnet.depth} layers"
        for prompt, text in zip(PROMPTS, _continuations(folder, candidate.llm, room), strict=True):
            yield f"{prompt!r} -> {text!r}"
    finally:
        candidate.close()


def check_engine(installed: str) -> None:
    """Raise ``UnfitMachineError`` where the vLLM installed is older than packages need.

    One built from source without metadata, whose version is ``unknown``, is taken as new enough.
    """
    if installed == UNKNOWN:
        return
    if Version(installed).release[:2] < Version(OLDEST_VLLM).release:
        raise UnfitMachineError(f"packages need vLLM {OLDEST_VLLM}, here is {installed}: {REMEDY}")


def _continuations(folder: Path, llm: Any, room: int) -> list[str]:
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [{"prompt_token_ids": tokenizer(prompt).input_ids[:room]} for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=CONTINUATION_TOKENS, logprobs=1, detokenize=False)
    answers = [out.outputs[0] for out in llm.generate(prompts, sampling, use_tqdm=False)]
    for answer in answers:
        if not all(math.isfinite(one.logprob) for step in answer.logprobs for one in step.values()):
            raise PackageError("the package computes probabilities that are not finite: make it again")
    return [tokenizer.decode(answer.token_ids) for answer in answers]
