"""What an endpoint opens of a package beside its weights: template, tokenizer, ends of texts, grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compressor import chat_template, grammar
from compressor.errors import PackageError


def prove(folder: Path, vocabulary: int) -> Iterator[str]:
    """Open each as the endpoint will, a line each. ``vocabulary``: how many logits the model has, which may
    be more than the tokenizer has texts for.

    Raises ``PackageError`` for what would keep the endpoint from starting or from answering at all.
    """
    yield chat_template.describe(folder)
    tokenizer = read_tokenizer(folder)
    known = tokenizer.get_vocab_size()
    yield f"{known} tokens have texts, of {vocabulary}"
    if known > vocabulary:
        yield f"the tokenizer knows {known} tokens, the model {vocabulary}: texts with the rest are refused"
    ends = read_ends(folder, vocabulary)
    if ends:
        names = ", ".join(repr(tokenizer.id_to_token(end) or f"token {end}") for end in ends)
        yield f"texts end with {names}"
    else:
        yield "no token ends a text: every answer runs to its limit"
    yield _prove_grammar(folder, vocabulary, ends)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Raises ``PackageError``."""
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare ones
        raise PackageError(f"{path} is not a tokenizer ({error}): make the package again") from None


def read_ends(folder: Path, vocabulary: int) -> list[int]:
    """The tokens that end a text, as who serves the package reads them. Raises ``PackageError``."""
    path = folder / "genai_config.json"
    try:
        if path.is_file() or (folder / "model.onnx").is_file():
            given: Any = json.loads(path.read_text(encoding="utf-8"))["model"].get("eos_token_id")
        else:
            given = read_config(folder).get("eos_token_id")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(f"{path} is missing or damaged ({error}): make the package again") from None
    ends = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(end, int) and 0 <= end < vocabulary for end in ends):
        raise PackageError(f"{path}: eos_token_id {given} is no token of the model: make the package again")
    return ends


def read_vocabulary(folder: Path) -> int:
    """How many logits the model of a folder has, by its configuration. Raises ``PackageError``."""
    try:
        return int(read_config(folder)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackageError(
            f"{folder}: config.json is missing or damaged ({error}): make the package again"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """What vLLM reads: a model's configuration, with that of its generation. Raises ``ValueError``."""
    found: dict[str, Any] = {}
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.is_file():
            found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def _prove_grammar(folder: Path, vocabulary: int, ends: list[int]) -> str:
    """A JSON object must be possible, and its mask must cover every logit."""
    if not grammar.AVAILABLE:
        return "grammars were not tried: pip install llguidance"
    words = grammar.open_vocabulary(folder / "tokenizer.json", vocabulary, ends)
    matcher = grammar.build(words, "json", '{"type": "object"}')
    mask = matcher.compute_bitmask()
    if matcher.is_error() or not any(mask) or 8 * len(mask) < vocabulary:
        raise PackageError(f"{folder}: its tokenizer can't write JSON, so replies can't be held to a schema")
    return f"replies can be held to a JSON schema over {vocabulary} tokens"
