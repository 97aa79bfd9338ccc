"""Grammars over a model's vocabulary, as llguidance has them: what ``serve`` obeys and ``verify`` opens."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from compressor.errors import PackageError, UnfitMachineError

try:
    llguidance: Any = importlib.import_module("llguidance")
except ImportError:  # said when something first needs it
    llguidance = None

Form = Literal["json", "tagged"]
"""What a grammar's text is: a JSON schema, or a Lark grammar around one."""

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One layout, so that a weak model can't pad JSON with white space for ever."""

AVAILABLE = llguidance is not None


def open_vocabulary(tokenizer: Path, size: int, ends: Sequence[int]) -> Any:
    """The vocabulary of a model with ``size`` logits, which may be more than its tokenizer knows.

    ``ends``: the tokens that end a text. Raises ``PackageError``, and ``UnfitMachineError`` without
    llguidance.
    """
    if llguidance is None:
        raise UnfitMachineError("grammars need llguidance: pip install llguidance")
    try:
        text = tokenizer.read_text(encoding="utf-8")
        known = llguidance.LLTokenizer(text, eos_token=list(ends) or None)
        if known.vocab_size >= size:
            return known
        return llguidance.LLTokenizer(text, n_vocab=size, eos_token=list(ends) or None)
    except (OSError, ValueError) as error:
        raise PackageError(f"{tokenizer} has no vocabulary for grammars ({_first_line(error)})") from None


def build(vocabulary: Any, form: Form, text: str) -> Any:
    """A matcher at its beginning. Raises ``ValueError`` for a grammar that can't be obeyed."""
    if form == "json":
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=LAYOUT)
    else:
        grammar = llguidance.LLMatcher.grammar_from_lark(text)
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(reason(matcher))
    return matcher


def reason(matcher: Any) -> str:
    """Why a matcher went wrong, in one line without the parser's state."""
    return _first_line(matcher.get_error()) or "no reason given"


def tagged(schema: Mapping[str, Any], before: str, after: str) -> str:
    """The text of a ``tagged`` grammar: JSON of a schema between two fixed strings."""
    parts = [json.dumps(before)] if before else []
    parts += ["value", *([json.dumps(after)] if after else [])]
    return f"start: {' '.join(parts)}\nvalue: %json {json.dumps({'x-guidance': LAYOUT, **schema})}\n"


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [""])[0][:300]
