"""Kinds of fields that bodies are made of, and what becomes of fields that stand in no model of ours.

OpenAI, vLLM and llama-server know many fields more. Those that change nothing are taken without effect,
those that would change the answer are refused by name; nothing is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from serve.errors import ApiError, bad_request

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256

_Item = TypeVar("_Item")
ListOf = Annotated[list[_Item], Field(fail_fast=True)]
"""Only the first wrong item is reported: a message for each of a million takes a minute."""


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 1.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


Integer = Annotated[int, BeforeValidator(_whole)]


def FewEntries(most: int) -> BeforeValidator:  # noqa: N802 # stands where types stand
    """An object of at most so many entries, counted before they are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("too_long", "at most {most} entries are allowed", {"most": most})
        return value

    return BeforeValidator(check)


def OneOf(forms: str) -> WrapValidator:  # noqa: N802 # stands where types stand
    """Several forms of a value: where the value has another, they are named, not the first one's fault."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            inner = [entry for entry in error.errors(include_url=False) if len(entry["loc"]) > 1]
            if isinstance(value, (list, dict)) and inner:
                deepest = max(inner, key=lambda entry: len(entry["loc"]))
                place = ".".join(str(part) for part in deepest["loc"][1:])[:200]
                raise PydanticCustomError(
                    "form", "should be {forms} ({place}: {why})",
                    {"forms": forms, "place": place, "why": deepest["msg"]},
                ) from None  # fmt: skip
            raise PydanticCustomError("form", "should be {forms}", {"forms": forms}) from None

    return WrapValidator(check)


def _stops(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not (
        isinstance(texts, list)
        and len(texts) <= MAX_STOPS
        and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS for text in texts)
    ):
        raise PydanticCustomError(
            "stop",
            "should be a text or a list of at most {count}, each of 1 to {length} characters",
            {"count": MAX_STOPS, "length": MAX_STOP_CHARACTERS},
        )
    return texts


Stop = Annotated[list[str], BeforeValidator(_stops)]

_Test = Callable[[Any], bool]


def _unset(value: Any) -> bool:
    """What a client library may send for a field that its user left alone."""
    return value is None or value is False or value in ("", [], {}, 0)


def _anything(_: Any) -> bool:
    return True


def _one(value: Any) -> bool:
    return value is None or value == 1


def _among(*values: Any) -> _Test:
    return lambda value: value is None or value in values


_NO_EFFECT: Mapping[str, _Test] = dict.fromkeys(
    ("user", "metadata", "safety_identifier", "session_id", "prompt_cache_key", "prompt_cache_retention"),
    _anything,
) | {
    "store": _anything,  # nothing is stored, which no answer depends on
    "service_tier": _among("auto", "default"),
    "request_id": _anything,
    "priority": _among(0),
    "cache_prompt": _anything,
    "skip_special_tokens": _among(True),
    "spaces_between_special_tokens": _among(True),
    "add_generation_prompt": _among(True),
    "return_tokens_as_token_ids": _unset,
    "include_reasoning": _anything,
    "repetition_penalty": _one,
    "repeat_penalty": _one,
    "length_penalty": _one,
    "truncation": _among("disabled"),
    "truncate_prompt_tokens": _among(None),
    "include": _among([]),
    "modalities": _among(["text"]),
    "n_predict": _among(-1),
    "background": _among(False),
    "reasoning": _among({"effort": None}, {"effort": None, "summary": None}, {}),
    "verbosity": _among("medium"),
    "top_logprobs": _among(0),
    "max_tool_calls": _among(None),
}
"""Fields without effect here, with the test of the values that have none elsewhere either."""


def check_unknown(body: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raises ``ApiError`` for the first field that would have been ignored."""
    for name, value in body.items():
        if name in known or _NO_EFFECT.get(name, _unset)(value):
            continue
        raise bad_request(f"'{name[:100]}' is not supported here: leave it out", name[:100])


def describe(error: ValidationError) -> ApiError:
    """The first thing wrong, with its place; what was sent is not repeated."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:200]
    message = f"{place}: {first['msg']}" if place else f"the body must be a JSON object: {first['msg']}"
    return bad_request(message, place or None)
