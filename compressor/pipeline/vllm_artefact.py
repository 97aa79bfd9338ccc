"""A vLLM package scored by the vLLM of another Python: each distinct text is sent once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.engines.vllm_score import Prompt, Reader
from compressor.evaluation.encoding import Encoded

if TYPE_CHECKING:
    from compressor.evaluation.scorer import Likelihoods


@dataclass(frozen=True)
class VllmArtefact:
    """A package's folder, read by the vLLM of another Python."""

    reader: Reader

    def top1(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack(self.reader.tops(ids.tolist()))

    def likelihoods(self, encoded: Sequence[Encoded], *, greedy: bool = True) -> Likelihoods:
        from compressor.evaluation.scorer import Likelihoods

        values, flags = zip(*scored(self.reader, encoded, greedy), strict=True)
        return Likelihoods(np.array(values), np.array(flags, np.bool_))


def scored(reader: Reader, encoded: Sequence[Encoded], greedy: bool) -> list[tuple[float, bool]]:
    """Each request's log-likelihood and whether it is greedy. Requests whose inputs are the same are one
    prompt, from which their last tokens branch."""
    prompts, places = branched(encoded)
    found = reader.branches(prompts, greedy=greedy)
    return [
        found[number].of(final, request.scored)
        for (number, final), request in zip(places, encoded, strict=True)
    ]


def branched(encoded: Sequence[Encoded]) -> tuple[list[Prompt], list[tuple[int, int]]]:
    """Distinct prompts in an order in which neighbours begin alike; for each request the number of its prompt
    and of its last token among that one's."""
    finals: dict[tuple[int, ...], dict[int, int]] = {}
    starts: dict[tuple[int, ...], int] = {}
    for request in encoded:
        mine = finals.setdefault(request.inputs, {})
        mine.setdefault(request.ids[-1], len(mine))
        start = len(request.ids) - request.scored
        starts[request.inputs] = min(start, starts.get(request.inputs, start))
    ordered = sorted(finals)
    numbers = {inputs: number for number, inputs in enumerate(ordered)}
    prompts = [Prompt(inputs, starts[inputs], tuple(finals[inputs])) for inputs in ordered]
    places = [(numbers[request.inputs], finals[request.inputs][request.ids[-1]]) for request in encoded]
    return prompts, places
