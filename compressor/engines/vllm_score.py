"""What a vLLM package predicts along given texts, computed by vLLM in a process of its own.

The process runs in the Python where vLLM is, which need not be this one: ``python -m
compressor.engines.vllm_score`` reads a request as JSON from its standard input and writes arrays to a file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.environments import ROOT
from compressor.errors import CompressorError, UnfitMachineError

CONCURRENT = 8
"""Texts read at once."""


@dataclass(frozen=True)
class Prediction:
    """Along a text of n tokens: ``top`` int64[n], the likeliest next token after each of them;
    ``logprobs`` float64[n - 1], of each token but the first, given those before it."""

    top: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float64]


def predict(
    package: Path, numerics: str, subnet: dict[str, Any], texts: Sequence[Sequence[int]], python: Path
) -> list[Prediction]:
    """A package's predictions along each text of at least two token ids.

    A text that leaves no room in the model's context loses its beginning, and its prediction is as much
    shorter. Raises ``UnfitMachineError`` where vLLM fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.npz"
        request = {
            "package": str(package.resolve()),
            "numerics": numerics,
            "subnet": subnet,
            "texts": [list(map(int, text)) for text in texts],
            "answer": str(answer),
        }
        done = subprocess.run(
            [str(python), "-m", "compressor.engines.vllm_score"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if not answer.is_file():
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise UnfitMachineError(
                f"vLLM could not score the package ({lines[-1] if lines else 'it was killed'}): free memory, "
                "or package on a machine with more"
            )
        with np.load(answer) as data:
            ends = np.cumsum(data["lengths"])[:-1]
            tops, logprobs = (np.split(data[name], ends) for name in ("top", "logprobs"))
    return [Prediction(top, row[:-1]) for top, row in zip(tops, logprobs, strict=True)]


def main() -> int:
    """Serve one request; the exit code is the error's own."""
    request = json.load(sys.stdin)
    try:
        rows = list(_predictions(request))
    except CompressorError as error:
        print(error)
        return error.exit_code
    scratch = Path(request["answer"]).with_suffix(".part.npz")
    np.savez(
        scratch,
        lengths=[len(top) for top, _ in rows],
        top=np.concatenate([top for top, _ in rows]),
        logprobs=np.concatenate([logprobs for _, logprobs in rows]),
    )
    scratch.replace(request["answer"])
    return 0


def _predictions(request: dict[str, Any]) -> Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Top tokens and log-probabilities of each text, both [n]; the last log-probability is no one's."""
    from compressor.engines.vllm import VllmEngine
    from compressor.profile import Workload
    from compressor.space import SubNetwork

    engine = VllmEngine(Path(request["package"]))
    room = engine.context_length - 1
    texts = [text[-room:] for text in request["texts"]]
    workload = Workload(prompt_tokens=max(map(len, texts)), output_tokens=1, concurrency=CONCURRENT)
    subnet = SubNetwork.from_dict(request["subnet"])
    candidate = engine.open_package(subnet, workload, request["numerics"])
    try:
        return [_row(output) for output in engine.read(candidate, texts)]
    finally:
        candidate.close()


def _row(output: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    ids, entries = output.prompt_token_ids[1:], output.prompt_logprobs[1:]
    top = [min(entry, key=lambda token: entry[token].rank) for entry in entries]
    logprobs = [entry[token].logprob for token, entry in zip(ids, entries, strict=True)]
    return np.array([*top, output.outputs[0].token_ids[0]], np.int64), np.array([*logprobs, np.nan])


if __name__ == "__main__":
    sys.exit(main())
