"""What ships, scored by the engine that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from compressor.engines.onnxruntime import OnnxCandidate, OnnxRuntimeEngine
from compressor.evaluation.encoding import Encoded

if TYPE_CHECKING:
    from compressor.evaluation.scorer import Likelihoods


class Artefact(Protocol):
    """A packaged sub-network's own predictions."""

    def top1(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The likeliest next token at every position, [batch, tokens] for ids [batch, tokens]."""
        ...

    def likelihoods(self, encoded: Sequence[Encoded], *, greedy: bool = True) -> Likelihoods:
        """Of each request's continuation; whether it is greedy may be left out where nobody asks."""
        ...


@dataclass(frozen=True)
class OnnxArtefact:
    """A candidate in ONNX Runtime, whose graph and weights are those of its package."""

    engine: OnnxRuntimeEngine
    candidate: OnnxCandidate

    def top1(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.engine.top1(self.candidate, ids)

    def likelihoods(self, encoded: Sequence[Encoded], *, greedy: bool = True) -> Likelihoods:
        from compressor.evaluation.scorer import score_by_logits

        del greedy  # known in any case
        return score_by_logits(encoded, lambda ids: self.engine.logits(self.candidate, ids))
