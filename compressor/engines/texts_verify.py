"""Proof that a package's texts begin and end: its tokenizer opens, its ends are tokens of its model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.errors import PackageError

AGAIN = "make the package again"


def prove_texts(folder: Path) -> Iterator[str]:
    """One line about the tokenizer and the ends of texts. Raises ``PackageError``.

    The model's vocabulary (rows of its embedding) and the tokenizer's (texts with a number) are two things:
    the former may be larger, and is padded then.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise PackageError(f"{path} is no tokenizer ({str(error)[:100]}): {AGAIN}") from None
    config = _read(folder / "config.json")
    model_vocabulary = int(config.get("vocab_size", 0))
    ends = end_tokens(folder)
    for end in ends:
        if not 0 <= end < model_vocabulary:
            raise PackageError(f"{folder}: texts end at token {end}, of {model_vocabulary}: {AGAIN}")
    names = [tokenizer.id_to_token(end) or f"token {end}" for end in ends]
    where = ", ".join(names) or "nothing: the model names no end token"
    yield f"{tokenizer.get_vocab_size()} tokens have texts, of {model_vocabulary}; a text ends at {where}"


def end_tokens(folder: Path) -> list[int]:
    """Ids that end a text, as who serves the package reads them."""
    genai = folder / "genai_config.json"
    if genai.is_file():
        ends = _read(genai).get("model", {}).get("eos_token_id")
    else:
        ends = (_read(folder / "config.json") | _read(folder / "generation_config.json")).get("eos_token_id")
    return [int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise PackageError(f"{path} is damaged ({error}): copy the package again") from None
