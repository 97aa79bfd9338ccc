"""Every kind of rotary embedding that GGUF files have: in transformers' words, and as the file says it."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.fidelity.files import make_model, write_model
from tests.fidelity.vocabularies import kinds

IDS = [(7 * i * i + 3 * i + 5) % 500 for i in range(96)]
THETA = 10000.0
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama3_factors(half: int, factor: float, low: float, high: float, trained: int) -> torch.Tensor:
    """Llama 3.1's published rule, frequency by frequency."""
    factors = []
    for i in range(half):
        length = 2 * math.pi * THETA ** (i / half)
        if length < trained / high:
            factors.append(1.0)
        elif length > trained / low:
            factors.append(factor)
        else:
            smooth = (trained / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_theta": THETA, "rope_type": kind, **settings}


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], torch.Tensor | None]] = {
    "default": ("llama", _rope("default"), {}, None),
    "kind none": (
        "llama",
        _rope("default"),
        {"rope__scaling__type": "none", "rope__scaling__factor": 4.0},
        None,
    ),
    "linear": (
        "llama",
        _rope("linear", factor=4.0),
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
        None,
    ),
    "linear, factor alone": ("qwen2", _rope("linear", factor=2.0), {"rope__scaling__factor": 2.0}, None),
    "linear, old key": ("llama", _rope("linear", factor=4.0), {"rope__scale_linear": 4.0}, None),
    "yarn": (
        "qwen2",
        _rope("yarn", factor=4.0, original_max_position_embeddings=32),
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 32,
        },
        None,
    ),
    "yarn of a llama": (
        "llama",
        _rope("yarn", factor=2.5, original_max_position_embeddings=48),
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 2.5,
            "rope__scaling__original_context_length": 48,
        },
        None,
    ),
    "llama3": (
        "llama",
        _rope("llama3", original_max_position_embeddings=8192, **_LLAMA3),
        {},
        llama3_factors(8, 8.0, 1.0, 4.0, 8192),
    ),
    "llama3, trained on short texts": (
        "llama",
        _rope("llama3", original_max_position_embeddings=64, **_LLAMA3),
        {},
        llama3_factors(8, 8.0, 1.0, 4.0, 64),
    ),
    "factors all one": ("llama", _rope("default"), {}, torch.ones(8)),
    "factors of no rule": (
        "llama",
        _rope(
            "longrope",
            factor=1.0,
            attention_factor=1.0,
            original_max_position_embeddings=128,
            short_factor=[1.0, 1.5, 1.25, 2.0, 3.0, 2.5, 4.0, 4.5],
            long_factor=[1.0, 1.5, 1.25, 2.0, 3.0, 2.5, 4.0, 4.5],
        ),
        {},
        torch.tensor([1.0, 1.5, 1.25, 2.0, 3.0, 2.5, 4.0, 4.5]),
    ),
}
"""(family, what a folder says, the file's keys, the file's factors) by name."""


@cache
def vocabulary() -> dict[str, Any]:
    return kinds()["smollm"]


def reference(name: str) -> PreTrainedModel:
    """The model as its own folder has it."""
    family, rope, _, _ = KINDS[name]
    return make_model(family, len(vocabulary()["tokenizer.ggml.tokens"]), rope_parameters=rope)


def write_rope(path: Path, name: str) -> Path:
    _, _, keys, factors = KINDS[name]
    tensors = None if factors is None else {"rope_freqs.weight": factors}
    return write_model(path, reference(name), vocabulary(), tensors, **keys)
