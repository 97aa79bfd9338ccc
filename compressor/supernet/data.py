"""Training data: Alpaca-form JSON or JSONL, plain text, a hub id, or what the model writes itself.

Short examples are packed end to end into rows of one length, so that no step computes padding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.events import Listener, Message, ignore
from compressor.supernet.losses import IGNORED
from compressor.supernet.sampling import sample_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Examples", "load_training_data", "sample_text"]

MAX_BROKEN_SHARE = 0.01

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""Stanford Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca)."""


@dataclass(frozen=True)
class Examples:
    """Token ids (examples, length) and labels of the same shape; ``IGNORED`` labels do not count."""

    ids: Tensor
    labels: Tensor

    @classmethod
    def of_text(cls, ids: Tensor) -> Examples:
        """Every token counts."""
        return cls(ids, ids)

    @property
    def learnable(self) -> Tensor:
        """(examples,) whether anything in a row counts; the first token is nobody's next one."""
        return (self.labels[:, 1:] != IGNORED).any(dim=1)

    def some(self, count: int, seed: int) -> Examples:
        """``count`` rows, drawn without repeats; all of them where there are no more."""
        if count >= len(self.ids):
            return self
        chosen = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(seed))[:count]
        return Examples(self.ids[chosen], self.labels[chosen])

    def split(self, held_out: int) -> tuple[Examples, Examples]:
        """(all but the last ``held_out`` rows, those)."""
        cut = len(self.ids) - held_out
        return Examples(self.ids[:cut], self.labels[:cut]), Examples(self.ids[cut:], self.labels[cut:])


@dataclass(frozen=True)
class _Piece:
    """A prompt, which is not learnt, and the text that follows it."""

    prompt: str
    response: str


def load_training_data(
    source: str, tokenizer: PreTrainedTokenizerBase, max_len: int, listener: Listener = ignore
) -> Examples:
    """Rows of ``max_len`` tokens from a file or the hub; of Alpaca rows only the response counts.

    Rows are ``{instruction, input, output}``, ``{question, answer}`` or ``{text}``. Broken ones are
    reported by number and left out, up to 1% of all; more raise ``InputError``.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        pieces = _checked(source, _json_rows(path), listener)
    elif path.is_file():
        pieces = [_Piece("", _read_text(path))]
    else:
        pieces = _checked(source, ((i, row) for i, row in enumerate(_hub_rows(source), 1)), listener)
    return _pack(source, pieces, tokenizer, max_len)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row); a line that is no JSON comes as the error's text."""
    text = _read_text(path)
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON (line {error.lineno}: {error.msg}): correct it") from None
        if not isinstance(rows, list):
            raise InputError(f"{path} is not a JSON list of rows: write one, or use JSONL")
        yield from ((number, _row(row)) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, _row(json.loads(line))
            except json.JSONDecodeError as error:
                yield number, f"not JSON: {error.msg}"


def _row(value: Any) -> Any:
    """A bare string stands for a text; other values are checked later."""
    return {"text": value} if isinstance(value, str) else value


def _hub_rows(source: str) -> Iterable[Any]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise InputError(f"no file '{source}', and HF_HUB_OFFLINE is set: name a .json, .jsonl or text file")
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(source, split="train")
    except Exception as error:  # the hub's clients raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise InputError(
            f"cannot read training data '{source}' ({reason}): name a file or a hub id"
        ) from None
    return rows


def _checked(source: str, rows: Iterable[tuple[int, Any]], listener: Listener) -> list[_Piece]:
    """The good rows. Raises ``InputError`` if more than ``MAX_BROKEN_SHARE`` are broken."""
    pieces: list[_Piece] = []
    broken: list[tuple[int, str]] = []
    for number, row in rows:
        piece = _piece(row)
        if isinstance(piece, str):
            broken.append((number, piece))
        else:
            pieces.append(piece)
    if broken:
        named = "; ".join(f"row {number}: {reason}" for number, reason in broken[:3])
        total = len(pieces) + len(broken)
        if len(broken) > MAX_BROKEN_SHARE * total:
            raise InputError(f"{source}: {len(broken)} of {total} rows are broken ({named}): correct them")
        listener(Message(f"{source}: left out {len(broken)} broken rows ({named})", "warning"))
    return pieces


def _piece(row: Any) -> _Piece | str:
    """What a row teaches, or what is wrong with it."""
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        return "not an object"
    fields = dict(row)
    if "instruction" not in fields and "question" in fields:
        fields |= {"instruction": fields["question"], "output": fields.get("answer")}
    wanted = ("instruction", "output") if "instruction" in fields else ("text",)
    for name in wanted:
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            return f"no {name}"
    if wanted == ("text",):
        return _Piece("", fields["text"])
    template = _WITH_INPUT if fields.get("input") else _WITHOUT_INPUT
    return _Piece(template.format(**{"input": "", **fields}), fields["output"])


def _pack(source: str, pieces: list[_Piece], tokenizer: Any, max_len: int) -> Examples:
    """All pieces end to end, each closed by the end-of-sequence token, cut into rows."""
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        prompt = tokenizer(piece.prompt)["input_ids"] if piece.prompt else []
        response = tokenizer(piece.response, add_special_tokens=not prompt)["input_ids"]
        response.append(tokenizer.eos_token_id)
        ids += prompt + response
        labels += [IGNORED] * len(prompt) + response
    rows = len(ids) // max_len
    if rows == 0:
        raise InputError(f"{source} holds {len(ids)} tokens, fewer than one row of {max_len}: give more text")
    shape = (rows, max_len)
    cut = rows * max_len
    return Examples(torch.tensor(ids[:cut]).view(shape), torch.tensor(labels[:cut]).view(shape))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text ({error}): correct it") from None
