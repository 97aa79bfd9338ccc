"""The user's training data before it is tokenized: Alpaca-form JSON or JSONL, plain text, or a hub id."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import InputError
from compressor.events import Listener, Message, ignore

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
class Piece:
    """A prompt, which is not learnt, and the text that follows it."""

    prompt: str
    response: str


def read_pieces(source: str, listener: Listener = ignore) -> list[Piece]:
    """What a file (by its ending, in capitals or not) or a data set of the hub teaches.

    Rows are ``{instruction, input, output}``, ``{question, answer}`` or ``{text}``. Broken ones are
    reported by number and left out, up to 1% of all; more raise ``InputError``.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() in (".json", ".jsonl"):
        return _checked(source, _json_rows(path), listener)
    if path.is_file():
        return [Piece("", _read_text(path))]
    return _checked(source, ((i, row) for i, row in enumerate(_hub_rows(source), 1)), listener)


def check_file(source: str) -> None:
    """Raise ``InputError`` for a file of training data that would be refused later. The hub is not asked."""
    if Path(source).expanduser().is_file():
        pieces = read_pieces(source)
        if not any(piece.response.strip() for piece in pieces):
            raise InputError(f"{source} holds no text: give more")


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row); a line that is no JSON comes as the error's text."""
    text = _read_text(path)
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON (line {error.lineno}: {error.msg}): correct it") from None
        if not isinstance(rows, list):
            raise InputError(f"{path} is not a JSON list of rows: write one, or use JSONL")
        yield from ((number, _row(row)) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also cuts at U+2028 and its like
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


def _checked(source: str, rows: Iterable[tuple[int, Any]], listener: Listener) -> list[Piece]:
    """The good rows. Raises ``InputError`` if more than ``MAX_BROKEN_SHARE`` are broken."""
    pieces: list[Piece] = []
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


def _piece(row: Any) -> Piece | str:
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
        return Piece("", fields["text"])
    template = _WITH_INPUT if fields.get("input") else _WITHOUT_INPUT
    return Piece(template.format(**{"input": "", **fields}), fields["output"])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text ({error}): correct it") from None
