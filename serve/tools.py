"""Tools: the calls that a model writes in its text, and a grammar for when it must write one."""

from __future__ import annotations

import json
import uuid
from typing import Any

from serve.errors import bad_request
from serve.grammar import Grammars
from serve.schemas import ChatBody, NamedTool
from serve.stops import StopMatcher

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def wants_tools(body: ChatBody) -> bool:
    return bool(body.tools) and body.tool_choice != "none"


def tool_grammar(grammars: Grammars, body: ChatBody, style: str) -> str:
    """A grammar for exactly one call, of the named tool or of any. Raises ``ApiError``."""
    tools = body.tools or []
    if isinstance(body.tool_choice, NamedTool):
        wanted = body.tool_choice.function.name
        tools = [tool for tool in tools if tool.function.name == wanted]
        if not tools:
            raise bad_request(f"tool_choice names '{wanted[:64]}', which is not among tools", "tool_choice")
    key = "arguments" if style == "hermes" else "parameters"
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                key: tool.function.parameters or {"type": "object"},
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return grammars.tagged_json(
        {"anyOf": calls}, *((f"{OPEN}\n", f"\n{CLOSE}") if style == "hermes" else ("", ""))
    )


class ToolParser:
    """Splits generated text into what the user reads and what is a call.

    ``style`` None: all is for the user. ``hermes``: calls stand in <tool_call> tags. ``json``: a reply that
    is a JSON object with a name is a call.
    """

    def __init__(self, style: str | None) -> None:
        self._style = style
        self._opening = StopMatcher([OPEN])
        self._text = ""
        self._shown = 0

    def add(self, text: str) -> str:
        """Text that is for the user beyond doubt."""
        if self._style is None:
            return text
        self._text += text
        if self._style == "json":
            return self._release(len(self._text)) if self._text.lstrip()[:1] not in ("", "{") else ""
        if self._opening.matched:
            return ""
        return self._release(self._shown + len(self._opening.add(text)))

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest for the user, and the calls."""
        rest = self._text[self._shown :]
        if self._style is None or not rest:
            return "", []
        calls = _hermes_calls(rest) if self._style == "hermes" else _json_call(rest)
        return ("", calls) if calls else (rest, [])

    def _release(self, end: int) -> str:
        text, self._shown = self._text[self._shown : end], end
        return text


def _hermes_calls(text: str) -> list[dict[str, Any]]:
    calls = []
    for part in text.split(OPEN)[1:]:
        calls.extend(_json_call(part.split(CLOSE)[0]))
    return calls


def _json_call(text: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return []
    arguments = value.get("arguments", value.get("parameters", {}))
    function = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}]
