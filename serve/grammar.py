"""Grammars that generated text must obey: any JSON object, a JSON schema, a regular expression."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import bad_request
from serve.tokenizer import Tokenizer

try:
    import llguidance
    import llguidance.numpy as masks
except ImportError:  # reported when a request first needs it
    llguidance = None

# one layout, so that a weak model can't pad JSON with white space for ever
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Grammars over one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos_tokens: frozenset[int]) -> None:
        self._path = tokenizer.path
        self._eos = sorted(eos_tokens)
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def json_object(self) -> str:
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any], param: str = "response_format") -> str:
        """A grammar for JSON of this schema. Raises ``ApiError`` for a schema that can't be obeyed."""
        _require_library()
        try:
            grammar = str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=LAYOUT))
        except ValueError as error:
            raise bad_request(f"the JSON schema can't be obeyed: {error}", param) from None
        if problem := llguidance.LLMatcher.validate_grammar(grammar):
            raise bad_request(f"the JSON schema can't be obeyed: {problem}", param)
        return grammar

    def tagged_json(self, schema: dict[str, Any], before: str, after: str, param: str = "tools") -> str:
        """A grammar for JSON of this schema between two fixed strings. Raises ``ApiError``."""
        _require_library()
        parts = [json.dumps(before)] if before else []
        parts += ["value", *([json.dumps(after)] if after else [])]
        grammar = f"start: {' '.join(parts)}\nvalue: %json {json.dumps({'x-guidance': LAYOUT, **schema})}\n"
        try:
            wrapped = str(llguidance.LLMatcher.grammar_from_lark(grammar))
        except ValueError as error:
            raise bad_request(f"the tools' parameters can't be obeyed: {error}", param) from None
        if problem := llguidance.LLMatcher.validate_grammar(wrapped):
            raise bad_request(f"the tools' parameters can't be obeyed: {problem}", param)
        return wrapped

    def constraint(self, grammar: str) -> GrammarConstraint:
        """A fresh matcher. Raises ``ApiError`` for a grammar that is too big or contradictory."""
        _require_library()
        with self._lock:
            if self._tokenizer is None:
                text = self._path.read_text(encoding="utf-8")
                self._tokenizer = llguidance.LLTokenizer(text, eos_token=self._eos or None)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise bad_request(f"the JSON schema can't be obeyed: {matcher.get_error()}", "response_format")
        return GrammarConstraint(matcher, self._tokenizer.vocab_size)


class GrammarConstraint:
    """What may come next in one sequence."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = masks.allocate_token_bitmask(1, vocabulary)
        self._vocabulary = vocabulary

    def forbidden(self) -> npt.NDArray[np.bool_]:
        """True for tokens that would break the grammar, [vocabulary]."""
        masks.fill_next_token_bitmask(self._matcher, self._mask)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._vocabulary]
        return bits == 0

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ValueError(f"the grammar refuses token {token}: {self._matcher.get_error()}")


def _require_library() -> None:
    if llguidance is None:
        raise bad_request(
            "this server has no grammar library: install it with `pip install llguidance`", "response_format"
        )
