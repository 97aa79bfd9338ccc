"""llama.cpp as an independent reader of GGUF files, from an environment of its own.

``python -m tests.fidelity.llama`` writes anew what ``expected/`` has of it, which pins the values where it is
not installed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LLAMA_PYTHON = Path(__file__).resolve().parents[2] / ".venv-llama" / "bin" / "python"
HOW = "llama.cpp is not installed: make setup-llama"
EXPECTED = Path(__file__).with_name("expected")
SHOWN = 44
"""Lines whose ids are written out; the others are pinned by a hash."""

_TOKENIZE = """
import ctypes, json, sys
import llama_cpp
from llama_cpp import Llama
answers = []
for path, texts in json.load(sys.stdin):
    model = Llama(path, vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    count = llama_cpp.llama_vocab_n_tokens(vocabulary)
    ids = []
    for text in texts:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        found = llama_cpp.llama_tokenize(vocabulary, data, len(data), room, len(room), True, True)
        ids.append(list(room[:found]))
    ends = [i for i in range(count) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    answers.append([ids, ends])
print(json.dumps(answers))
"""
_LOGITS = """
import json, sys
import numpy as np
from llama_cpp import Llama
answers = []
for path, ids in json.load(sys.stdin):
    model = Llama(path, n_ctx=len(ids), n_batch=len(ids), logits_all=True, n_threads=1, verbose=False)
    model.eval(ids)
    answers.append(model.scores[: len(ids)].tolist())
print(json.dumps(answers))
"""


def tokenize(files: Sequence[tuple[Path, Sequence[str]]]) -> list[tuple[list[list[int]], list[int]]]:
    """For each file the ids of its texts, with what stands around them, and the ids that end a text."""
    return [(ids, ends) for ids, ends in _ask(_TOKENIZE, [[str(path), list(texts)] for path, texts in files])]


def logits(files: Sequence[tuple[Path, Sequence[int]]]) -> list[list[list[float]]]:
    """For each file the logits [tokens, vocabulary] after each of the ids."""
    return list(_ask(_LOGITS, [[str(path), list(ids)] for path, ids in files]))


def summary(ids: Sequence[Sequence[int]], ends: Sequence[int]) -> dict[str, Any]:
    """What is kept of a tokenizer's answers."""
    digest = hashlib.sha256(json.dumps([list(row) for row in ids]).encode()).hexdigest()
    return {"ends": sorted(ends), "digest": digest, "first": [" ".join(map(str, row)) for row in ids[:SHOWN]]}


def _ask(script: str, question: Any) -> Any:
    done = subprocess.run(
        [str(LLAMA_PYTHON), "-c", script],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _write(name: str, values: Mapping[str, Any]) -> None:
    (EXPECTED / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    from tests.fidelity.files import write_vocabulary
    from tests.fidelity.ropes import IDS, KINDS, write_rope
    from tests.fidelity.vocabularies import kinds, lines

    made = kinds()
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_vocabulary(Path(folder) / f"{i}.gguf", kind) for i, kind in enumerate(made.values())]
        answers = tokenize([(path, lines()) for path in paths])
        _write("ids.json", {name: summary(*answer) for name, answer in zip(made, answers, strict=True)})
        ropes = [write_rope(Path(folder) / f"rope{i}.gguf", name) for i, name in enumerate(KINDS)]
        firsts = [
            [max(range(len(row)), key=row.__getitem__) for row in rows]
            for rows in logits([(path, IDS) for path in ropes])
        ]
        _write("first_choices.json", {n: " ".join(map(str, f)) for n, f in zip(KINDS, firsts, strict=True)})


if __name__ == "__main__":
    main()
