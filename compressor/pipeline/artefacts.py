"""What ships, scored by the engine that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from compressor.engines.onnxruntime import OnnxCandidate, OnnxRuntimeEngine
from compressor.engines.vllm_score import Prediction, predict
from compressor.evaluation.encoding import Encoded
from compressor.space import SubNetwork

if TYPE_CHECKING:
    from compressor.evaluation.scorer import Likelihoods


class Artefact(Protocol):
    """A packaged sub-network's own predictions."""

    def top1(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The likeliest next token at every position, [batch, tokens] for ids [batch, tokens]."""
        ...

    def likelihoods(self, encoded: Sequence[Encoded]) -> Likelihoods: ...


@dataclass(frozen=True)
class OnnxArtefact:
    """A candidate in ONNX Runtime, whose graph and weights are those of its package."""

    engine: OnnxRuntimeEngine
    candidate: OnnxCandidate

    def top1(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.engine.top1(self.candidate, ids)

    def likelihoods(self, encoded: Sequence[Encoded]) -> Likelihoods:
        from compressor.evaluation.scorer import score_by_logits

        return score_by_logits(encoded, lambda ids: self.engine.logits(self.candidate, ids))


@dataclass(frozen=True)
class VllmArtefact:
    """A package's folder, read by the vLLM of another Python."""

    package: Path
    numerics: str
    subnet: SubNetwork
    python: Path

    def top1(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack([prediction.top for prediction in self._predict(ids.tolist())])

    def likelihoods(self, encoded: Sequence[Encoded]) -> Likelihoods:
        from compressor.evaluation.scorer import Likelihoods

        values, greedy = np.empty(len(encoded)), np.empty(len(encoded), np.bool_)
        for number, found in enumerate(self._predict([request.ids for request in encoded])):
            scored = encoded[number].scored
            values[number] = found.logprobs[-scored:].sum()
            greedy[number] = bool((found.top[-scored - 1 : -1] == encoded[number].ids[-scored:]).all())
        return Likelihoods(values, greedy)

    def _predict(self, texts: Sequence[Sequence[int]]) -> list[Prediction]:
        return predict(self.package, self.numerics, self.subnet.to_dict(), texts, self.python)
