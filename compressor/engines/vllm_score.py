"""What a vLLM package predicts of given texts, computed by vLLM in a process of its own.

The process runs in the Python where vLLM is, which need not be this one: ``python -m
compressor.engines.vllm_score`` reads a request as JSON from its standard input and writes a file for every
``BATCH`` of its texts, so that one that was killed goes on behind those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.engines.children import run_child
from compressor.environments import ROOT
from compressor.errors import CompressorError, UnfitMachineError

CONCURRENT = 8
"""Texts read at once."""
BATCH = 256
"""Texts whose results are held in memory, and written together."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Prompt:
    """A text of token ids, and what is wanted of it: the log-probabilities of its own tokens from number
    ``start`` on, and of each of ``finals`` as the token after it."""

    ids: tuple[int, ...]
    start: int
    finals: tuple[int, ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Prompt:
        return cls(tuple(data["ids"]), int(data["start"]), tuple(data["finals"]))

    def within(self, room: int) -> Prompt:
        """The same without its beginning, where it is longer than ``room``."""
        cut = max(0, len(self.ids) - room)
        return Prompt(self.ids[cut:], max(1, self.start - cut), self.finals) if cut else self


@dataclass(frozen=True)
class Branches:
    """What was wanted of a prompt, in nats, and whether each is the likeliest token there."""

    inside: Floats
    inside_top: Flags
    finals: Floats
    finals_top: Flags

    def of(self, final: int, scored: int) -> tuple[float, bool]:
        """The log-likelihood of the last ``scored`` tokens, that numbered ``final`` the last of them; whether
        all are the likeliest."""
        before = scored - 1
        kept = slice(len(self.inside) - before, None)
        value = float(self.inside[kept].sum() + self.finals[final])
        return value, bool(self.inside_top[kept].all() and self.finals_top[final])


@dataclass(frozen=True)
class Reader:
    """A package's folder, what it holds, the Python where vLLM is, and a folder that keeps what was read."""

    package: Path
    numerics: str
    subnet: dict[str, Any]
    python: Path
    kept_in: Path

    def tops(self, texts: Sequence[Sequence[int]]) -> list[Ints]:
        """The likeliest next token after each token of each text of at least two."""
        parts = self._read({"texts": [list(map(int, text)) for text in texts]})
        return [row for part in parts for row in np.split(part["top"], np.cumsum(part["lengths"])[:-1])]

    def branches(self, prompts: Sequence[Prompt], *, greedy: bool) -> list[Branches]:
        """Log-probabilities that the prompts ask for, each prompt read once; with ``greedy`` it is known, at
        some cost, which of the tokens inside prompts are the likeliest."""
        parts = self._read({"prompts": [asdict(prompt) for prompt in prompts], "greedy": greedy})
        return [found for part in parts for found in _branches_of(part)]

    def _read(self, asked: dict[str, Any]) -> list[dict[str, npt.NDArray[Any]]]:
        """The parts that answer a request, those of an earlier try among them. Raises ``UnfitMachineError``
        where vLLM fails."""
        digest = hashlib.sha256(json.dumps([self.numerics, self.subnet, asked]).encode()).hexdigest()[:16]
        folder = self.kept_in / digest
        folder.mkdir(parents=True, exist_ok=True)
        request = {
            "package": str(self.package.resolve()),
            "numerics": self.numerics,
            "subnet": self.subnet,
            "answer": str(folder.resolve()),
            **asked,
        }
        command = [str(self.python), "-m", "compressor.engines.vllm_score"]
        done = run_child(command, json.dumps(request), ROOT)
        count = -(-len(asked.get("texts") or asked["prompts"]) // BATCH)
        files = [_part(folder, number) for number in range(count)]
        if done.returncode or not all(file.is_file() for file in files):
            lines = done.output.strip().splitlines()
            raise UnfitMachineError(
                f"vLLM could not score the package ({lines[-1] if lines else 'it was killed'}): free memory "
                "and go on with --resume, or package on a machine with more"
            )
        found = []
        for file in files:
            with np.load(file) as data:
                found.append({name: data[name] for name in data.files})
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # another request's parts are there still
            self.kept_in.rmdir()
        return found


def main() -> int:
    """Serve one request; the exit code is the error's own."""
    request = json.load(sys.stdin)
    try:
        _answer(request)
    except CompressorError as error:
        print(error)
        return error.exit_code
    return 0


def _answer(request: dict[str, Any]) -> None:
    from compressor.engines.vllm import VllmEngine
    from compressor.profile import Workload
    from compressor.space import SubNetwork

    folder = Path(request["answer"])
    engine = VllmEngine(Path(request["package"]))
    room = engine.context_length - 1
    texts = [text[-room:] for text in request.get("texts", ())]
    prompts = [Prompt.from_dict(prompt).within(room) for prompt in request.get("prompts", ())]
    count = len(texts) + len(prompts)
    missing = [n for n in range(-(-count // BATCH)) if not _part(folder, n).is_file()]
    if not missing:
        return
    longest = max(len(ids) for ids in (*texts, *(prompt.ids for prompt in prompts)))
    workload = Workload(prompt_tokens=longest, output_tokens=1, concurrency=CONCURRENT)
    subnet = SubNetwork.from_dict(request["subnet"])
    candidate = engine.open_package(subnet, workload, request["numerics"], scores=True)
    try:
        for number in missing:
            rows = slice(number * BATCH, (number + 1) * BATCH)
            if texts:
                _keep(_part(folder, number), _of_tops(engine.read(candidate, texts[rows])))
            else:
                _keep(
                    _part(folder, number),
                    _of_branches(engine.branch(candidate, prompts[rows], request["greedy"])),
                )
    finally:
        candidate.close()


def _of_tops(outputs: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
    rows = [_top_row(output) for output in outputs]
    return {"lengths": np.array([len(row) for row in rows]), "top": np.concatenate(rows)}


def _top_row(output: Any) -> Ints:
    top = [min(entry, key=lambda token: entry[token].rank) for entry in output.prompt_logprobs[1:]]
    return np.array([*top, output.outputs[0].token_ids[0]], np.int64)


def _of_branches(found: Sequence[Branches]) -> dict[str, npt.NDArray[Any]]:
    return {
        "inside_lengths": np.array([len(one.inside) for one in found]),
        "final_lengths": np.array([len(one.finals) for one in found]),
        "inside": np.concatenate([one.inside for one in found]),
        "inside_top": np.concatenate([one.inside_top for one in found]),
        "finals": np.concatenate([one.finals for one in found]),
        "finals_top": np.concatenate([one.finals_top for one in found]),
    }


def _branches_of(part: dict[str, npt.NDArray[Any]]) -> list[Branches]:
    inside, final = (np.cumsum(part[f"{name}_lengths"])[:-1] for name in ("inside", "final"))
    rows = zip(
        *(np.split(part[name], inside) for name in ("inside", "inside_top")),
        *(np.split(part[name], final) for name in ("finals", "finals_top")),
        strict=True,
    )
    return [Branches(*row) for row in rows]


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.npz"


def _keep(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write a part, whole or not at all."""
    scratch = path.with_suffix(".tmp.npz")
    np.savez(scratch, **arrays)  # type: ignore[arg-type]
    scratch.replace(path)


if __name__ == "__main__":
    sys.exit(main())
