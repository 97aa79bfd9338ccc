"""Rotary embeddings as a GGUF file gives them, in transformers' words.

llama.cpp turns position p by ``p / (factor · θ^(2i/d))``: ``rope.scaling.*`` keys name linear and YaRN
scaling (Peng et al., arXiv 2309.00071), and Llama 3's own scaling comes as a factor for each frequency, in
the tensor ``rope_freqs.weight``. Its parameters are found again, so that the model can be saved as any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import InputError
from compressor.gguf_metadata import number, open_reader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from compressor.space import ModelShape

FACTORS = "rope_freqs.weight"
"""The tensor of what each rotary frequency is divided by."""
_USUAL_LLAMA3 = (8192, 1.0, 4.0)
_EXACT = 1e-5

Rope = dict[str, Any]


def rope_parameters(path: Path, fields: Mapping[str, Any], shape: ModelShape) -> Rope:
    """transformers' ``rope_parameters``. Raises ``InputError`` for what it cannot say."""
    theta = _plain(number(fields, "rope.freq_base", 10000.0))
    factors = _factors(path)
    kind, factor = _scaling(fields)
    if kind not in ("none", "linear", "yarn"):
        raise _refusal(path, f"is scaled the '{kind}' way")
    attention = float(number(fields, "rope.scaling.attn_factor", 1.0))
    if kind != "yarn" and attention != 1.0:
        raise _refusal(path, f"has rope.scaling.attn_factor {attention:g} without YaRN")
    if factors is not None:
        if str(fields["general.architecture"]) != "llama" or kind == "yarn":
            raise _refusal(path, f"has the tensor {FACTORS} where none belongs")
        return _of_factors(path, factors * factor, theta, shape)
    if kind == "yarn" and factor != 1.0:
        return _yarn(fields, theta, factor, attention, shape)
    if factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _scaling(fields: Mapping[str, Any]) -> tuple[str, float]:
    """Kind and factor; a factor without a kind is linear."""
    kind = str(number(fields, "rope.scaling.type", "linear"))
    factor = float(number(fields, "rope.scaling.factor", number(fields, "rope.scale_linear", 0.0)) or 1.0)
    return kind, 1.0 if kind == "none" else _plain(factor)


def _yarn(
    fields: Mapping[str, Any], theta: float, factor: float, attention: float, shape: ModelShape
) -> Rope:
    trained = number(fields, "rope.scaling.original_context_length", shape.max_position_embeddings)
    found: Rope = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": int(trained),
    }
    named = number(fields, "rope.scaling.yarn_attn_factor")
    if named is not None:
        found["attention_factor"] = _plain(named) * attention
    elif attention != 1.0:
        found["attention_factor"] = (0.1 * math.log(factor) + 1.0) * attention
    for name in ("beta_fast", "beta_slow"):
        value = number(fields, f"rope.scaling.yarn_{name}")
        if value is not None:
            found[name] = _plain(value)
    return found


def _factors(path: Path) -> NDArray[np.float64] | None:
    for tensor in open_reader(path).tensors:
        if tensor.name == FACTORS:
            return np.asarray(tensor.data, np.float64).reshape(-1)
    return None


def _of_factors(path: Path, factors: NDArray[np.float64], theta: float, shape: ModelShape) -> Rope:
    """Llama 3's parameters if the factors follow from some, else the factors themselves."""
    half = shape.head_dim // 2
    if len(factors) != half or not (factors > 0).all():
        raise _refusal(path, f"has {len(factors)} factors for {half} frequencies")
    if np.allclose(factors, factors[0], rtol=_EXACT):
        factor = _plain(factors[0])
        kind: Rope = {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
        return {**kind, "rope_theta": theta}
    lengths = 2 * math.pi * theta ** (np.arange(half) / half)
    for trained, low, high in (_USUAL_LLAMA3, *_solved(factors, lengths)):
        factor = _plain(factors.max())
        if np.allclose(_llama3(lengths, factor, trained, low, high), factors, rtol=_EXACT):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
    same = [float(value) for value in factors]
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": same,
        "long_factor": same,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": shape.max_position_embeddings,
    }


def _llama3(
    lengths: NDArray[np.float64], factor: float, trained: int, low: float, high: float
) -> NDArray[np.float64]:
    """What Llama 3.1 divides frequencies of these wavelengths by."""
    smooth = np.clip((trained / lengths - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _solved(factors: NDArray[np.float64], lengths: NDArray[np.float64]) -> list[tuple[int, float, float]]:
    """Parameters from the two outermost frequencies that are neither kept nor divided in full."""
    most = factors.max()
    between = np.flatnonzero((factors > 1 + 1e-4) & (factors < most * (1 - 1e-4)))
    if len(between) < 2:
        return []
    first, last = between[0], between[-1]
    smooth = (1 / factors - 1 / most) / (1 - 1 / most)
    slope = (smooth[first] - smooth[last]) / (1 / lengths[first] - 1 / lengths[last])
    offset = slope / lengths[first] - smooth[first]
    if offset <= 0:
        return []
    exact = (slope / offset, 1.0, 1.0 + 1.0 / offset)
    return [(round(exact[0]), 1.0, _plain(round(exact[2], 3))), (round(exact[0]), 1.0, exact[2])]


def _plain(value: float) -> float:
    """A number of the file's fp32 as it was written down."""
    return float(f"{float(value):.7g}")


def _refusal(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: its rotary embedding {what}, which cannot be followed exactly: use the Hugging Face folder "
        "of this model, or another model"
    )
