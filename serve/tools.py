"""Tools: the calls that a model writes in its text, and a grammar for when it must write one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from compressor.chat_template import ChatTemplates
from serve.errors import bad_request
from serve.schemas import NamedTool, Tool
from serve.stops import StopMatcher

OPEN, CLOSE = "<tool_call>", "</tool_call>"

Style = Literal["hermes", "json"]
"""How a model writes a call: in <tool_call> tags, or as a bare object."""

Choice = Literal["none", "auto", "required"] | NamedTool | None


def style_of(templates: ChatTemplates | None) -> Style:
    """As its template has it; a template without tools gets ours."""
    if templates is None or not templates.takes_tools:
        return "hermes"
    return "hermes" if OPEN in templates.source(tools=True) else "json"


def must_call(tools: Sequence[Tool] | None, choice: Choice) -> bool:
    """Whether the reply has to be a call."""
    return bool(tools) and choice not in (None, "auto", "none")


def check_choice(tools: Sequence[Tool] | None, choice: Choice) -> None:
    """Raises ``ApiError`` for a choice among tools that aren't there."""
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise bad_request("tool_choice needs tools", "tool_choice")
    if isinstance(choice, NamedTool):
        _named(tools, choice.function.name)


def call_schema(tools: Sequence[Tool], choice: Choice, style: Style) -> dict[str, Any]:
    """The JSON schema of exactly one call, of the named tool or of any. Raises ``ApiError``."""
    if isinstance(choice, NamedTool):
        tools = [_named(tools, choice.function.name)]
    key = "arguments" if style == "hermes" else "parameters"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, key: _parameters(tool)},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def tags(style: Style) -> tuple[str, str]:
    """What stands before and after a call."""
    return (f"{OPEN}\n", f"\n{CLOSE}") if style == "hermes" else ("", "")


def describe_tools(functions: Sequence[Mapping[str, Any]]) -> str:
    """The tools in words, for a model whose template has no place for them."""
    lines = "\n".join(json.dumps(function["function"], ensure_ascii=False) for function in functions)
    return (
        f"You can call these functions, each given as JSON:\n{lines}\n\n"
        "To call one, answer with nothing but\n"
        f'{OPEN}\n{{"name": "the function\'s name", "arguments": {{...}}}}\n{CLOSE}\n'
        "You are then told its result. If none helps, answer in words."
    )


def write_call(function: Mapping[str, Any]) -> str:
    """A call of an earlier turn, as ``describe_tools`` asks for it."""
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}"


def write_result(content: str) -> str:
    return f"<tool_response>\n{content}\n</tool_response>"


def _named(tools: Sequence[Tool], wanted: str) -> Tool:
    found = next((tool for tool in tools if tool.function.name == wanted), None)
    if found is None:
        raise bad_request(f"tool_choice names '{wanted[:64]}', which is not among tools", "tool_choice")
    return found


def _parameters(tool: Tool) -> dict[str, Any]:
    """A tool without parameters is called with none."""
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class ToolParser:
    """Splits generated text into what the user reads and what is a call.

    ``style`` None: all is for the user. ``hermes``: calls stand in <tool_call> tags. ``json``: a reply that
    is a JSON object with a name is a call. ``most``: calls beyond so many are dropped.
    """

    def __init__(self, style: Style | None, most: int | None = None) -> None:
        self._style = style
        self._most = most
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
        return ("", calls[: self._most]) if calls else (rest, [])

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
