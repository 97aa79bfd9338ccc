"""Choosing the next token from logits, and what log-probabilities to report for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
GREEDY_BELOW = 1e-5  # a temperature: there only equal logits share the choice, and dividing by it overflows
_RARE = 1e-3  # of the likeliest token's weight: below it lies little but in flat distributions


@dataclass(frozen=True)
class SamplingParams:
    """How to choose. Defaults sample from the model's distribution as it is."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability (natural), and the likeliest alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The choice of one sequence's tokens; the same seed gives the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)
        self._counts: Counter[int] = Counter()
        self._bias_ids = np.fromiter(params.logit_bias, np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)

    def choose(self, logits: Logits, forbidden: npt.NDArray[np.bool_] | None = None) -> int:
        """The next token from ``logits`` [vocabulary]; never one that ``forbidden`` marks."""
        adjusted = self._adjust(logits, forbidden)
        token = self._sample(adjusted) if self._params.temperature >= GREEDY_BELOW else int(adjusted.argmax())
        if self._params.frequency_penalty or self._params.presence_penalty:
            self._counts[token] += 1
        return token

    def _adjust(self, logits: Logits, forbidden: npt.NDArray[np.bool_] | None) -> Logits:
        """Bias, penalties (OpenAI: c * frequency + [c > 0] * presence off the logit) and grammar."""
        if not (len(self._bias_ids) or self._counts or forbidden is not None):
            return logits
        adjusted = logits.copy()
        adjusted[self._bias_ids] += self._bias
        if self._counts:
            ids = np.fromiter(self._counts, np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            adjusted[ids] -= counts * self._params.frequency_penalty + self._params.presence_penalty
        if forbidden is not None:
            adjusted[forbidden] = -np.inf
        return adjusted

    def _sample(self, logits: Logits) -> int:
        params = self._params
        weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
        if not params.top_k and params.top_p >= 1 and not params.min_p:
            return self._draw(weights)
        order = _truncate(weights, params)
        return int(order[self._draw(weights[order])])

    def _draw(self, weights: Logits) -> int:
        cumulative = weights.cumsum(dtype=np.float64)
        index = int(cumulative.searchsorted(self._random.random() * cumulative[-1], side="right"))
        return min(index, len(weights) - 1)


def logprob_of(logits: Logits, token: int, top: int) -> TokenLogprob:
    """The log-probability of ``token`` under the model's own distribution, with ``top`` alternatives."""
    peak = float(logits.max())
    normalizer = peak + float(np.log(np.exp(logits - peak, dtype=np.float64).sum()))
    best: tuple[tuple[int, float], ...] = ()
    if top:
        ids = _largest(logits, top)
        best = tuple((int(index), float(logits[index]) - normalizer) for index in ids)
    return TokenLogprob(token, float(logits[token]) - normalizer, best)


def _truncate(weights: Logits, params: SamplingParams) -> npt.NDArray[np.int64]:
    """Ids that top_k, then top_p (nucleus), then min_p leave, likeliest first; the largest weight is 1."""
    total = float(weights.sum(dtype=np.float64))
    order = np.flatnonzero(weights >= _RARE)
    if not _suffices(weights[order], total, params):
        order = np.arange(len(weights))
    order = order[_largest(weights[order], params.top_k or len(order))]
    kept = weights[order].astype(np.float64)
    if params.top_p < 1:
        before = kept.cumsum() - kept
        order = order[before < params.top_p * (kept.sum() if params.top_k else total)]
    return order[weights[order] >= params.min_p]


def _suffices(frequent: Logits, total: float, params: SamplingParams) -> bool:
    """Whether the tokens that aren't rare include all that may be kept; sorting them is cheap."""
    if params.top_k:
        return len(frequent) >= params.top_k
    if params.top_p < 1:
        return bool(frequent.sum(dtype=np.float64) >= params.top_p * total)
    return params.min_p >= _RARE


def _largest(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Indices of the largest values, largest first."""
    if count < len(values):
        head = np.argpartition(values, -count)[-count:]
        return np.asarray(head[np.argsort(-values[head], kind="stable")], np.int64)
    return np.asarray(np.argsort(-values, kind="stable"), np.int64)
