"""Conversations to prompt tokens, through the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve.errors import bad_request
from serve.sandbox import RefusalError
from serve.schemas import Message, TextPart, Tool, ToolCall
from serve.service import Service
from serve.tools import describe_tools, write_call, write_result

_Plain = dict[str, Any]


async def chat_prompt(
    service: Service,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, Any] | None = None,
    param: str = "messages",
) -> list[int]:
    """Token ids of a conversation with the assistant's turn begun. Raises ``ApiError``."""
    template = service.package.template
    if template is None:
        raise bad_request("this model has no chat template: use /v1/completions", code="no_chat_template")
    turns = [_plain(message, f"{param}[{index}]") for index, message in enumerate(messages)]
    functions = [_function(tool) for tool in tools] if tools else None
    try:
        if template.takes_tools:
            text = await service.render(turns, functions, variables)
        else:
            text = await _render_generic(service, turns, functions, variables)
    except RefusalError as error:
        raise bad_request(f"the model's chat template refuses these messages: {error}", param) from None
    return await service.encode(text, False, param)


def text_of(content: str | Sequence[TextPart] | None, param: str) -> str:
    """The text of a message's content. Raises ``ApiError`` for images and sound."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise bad_request(f"content of type '{part.type[:40]}' is not supported: send text", param)
    return "".join(part.text or "" for part in content)


async def _render_generic(
    service: Service, turns: list[_Plain], functions: list[_Plain] | None, variables: Mapping[str, Any] | None
) -> str:
    """Through a template that knows no tools: they are described in words, calls and results are text."""
    turns = [_in_words(turn) for turn in turns]
    if functions is None:
        return await service.render(turns, None, variables)
    words = describe_tools(functions)
    try:
        return await service.render(_beginning_with("system", words, turns), None, variables)
    except RefusalError:  # some templates take no system message
        return await service.render(_beginning_with("user", words, turns), None, variables)


def _beginning_with(role: str, words: str, turns: Sequence[_Plain]) -> list[_Plain]:
    """The conversation with ``words`` before its first message, which is of this role."""
    if turns and turns[0]["role"] == role:
        return [{**turns[0], "content": f"{words}\n\n{turns[0]['content']}"}, *turns[1:]]
    return [{"role": role, "content": words}, *turns]


def _in_words(turn: _Plain) -> _Plain:
    """A message as one without tools: a result comes from the user."""
    if turn["role"] == "tool":
        return {"role": "user", "content": write_result(turn["content"])}
    if calls := turn.get("tool_calls"):
        written = [write_call(call["function"]) for call in calls]
        return {"role": turn["role"], "content": "\n".join(filter(None, [turn["content"], *written]))}
    return turn


def _plain(message: Message, place: str) -> _Plain:
    """A message as templates expect it."""
    role = "system" if message.role == "developer" else message.role
    plain: _Plain = {"role": role, "content": text_of(message.content, f"{place}.content")}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            _call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)
        ]
    return plain


def _call(call: ToolCall, place: str) -> _Plain:
    arguments = _arguments(call.function.arguments, f"{place}.function.arguments")
    function = {"name": call.function.name, "arguments": arguments}
    return {"type": "function", "id": call.id, "function": function}


def _arguments(given: str | dict[str, Any] | None, place: str) -> Any:
    """Templates want the arguments as an object; clients send them as JSON text, or none."""
    if given is None or isinstance(given, dict):
        return given or {}
    if not given.strip():
        return {}
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise bad_request("a tool call's arguments are not JSON", place) from None


def _function(tool: Tool) -> _Plain:
    given = tool.function
    fields = {"name": given.name, "description": given.description, "parameters": given.parameters}
    function = {name: value for name, value in fields.items() if value is not None}
    return {"type": "function", "function": function}
