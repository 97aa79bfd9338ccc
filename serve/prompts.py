"""Conversations to prompt tokens, through the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serve.errors import bad_request
from serve.schemas import Message, TextPart, Tool
from serve.service import Service


async def chat_prompt(
    service: Service, messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> list[int]:
    """Token ids of a conversation with the assistant's turn begun. Raises ``ApiError``."""
    template = service.package.template
    if template is None:
        raise bad_request("this model has no chat template: use /v1/completions", code="no_chat_template")
    if tools and not template.takes_tools:
        raise bad_request("this model's chat template has no tools: leave tools out", "tools")
    text = template.render(
        [_plain(message, index) for index, message in enumerate(messages)],
        [tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
    )
    return await service.encode(text, add_special_tokens=False)


def text_of(content: str | Sequence[TextPart] | None, param: str) -> str:
    """The text of a message's content. Raises ``ApiError`` for images and sound."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise bad_request(f"content of type '{part.type[:40]}' is not supported: send text", param)
    return "".join(part.text or "" for part in content)


def _plain(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": text_of(message.content, f"messages[{index}].content")}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(text: str) -> Any:
    """Templates want the arguments as an object; clients send them as JSON text."""
    try:
        return json.loads(text)
    except ValueError:
        raise bad_request("a tool call's arguments are not JSON", "messages") from None
