"""/v1/responses: input and instructions in, a message or calls of functions out; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.body import body_of, post
from serve.conversation import Conversation, format_schema
from serve.prompts import text_of
from serve.reply import json_reply
from serve.requests import check_model, new_id
from serve.sampling import SamplingParams
from serve.schemas import (
    FunctionTool,
    InputCall,
    InputMessage,
    InputReasoning,
    InputResult,
    Message,
    NamedFunction,
    NamedFunctionTool,
    NamedTool,
    ResponsesBody,
    Tool,
    ToolCall,
    ToolCallFunction,
    ToolFunction,
)
from serve.sequence import Finished
from serve.service import Generation, Service
from serve.streaming import complete_or_leave, typed_event_stream, unless_gone
from serve.tools import Choice, style_of

_Event = tuple[str, dict[str, Any]]


def response_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @post(router, "/v1/responses", ResponsesBody)
    async def create_response(
        request: Request, body: ResponsesBody = body_of(ResponsesBody, service.reading)
    ) -> Response:
        """Answer in text, or call functions."""
        check_model(service, body.model)
        conversation = _conversation(service, body)
        conversation.check()
        with service.place(1) as place:
            prepared = await unless_gone(request, conversation.prepare(service))
            generation = place.start(*prepared)
        reply = _Reply(service, body, conversation)
        if body.stream:
            return typed_event_stream(reply.events(generation))
        (completion,) = await complete_or_leave(request, generation)
        assert completion.finished is not None
        return await json_reply(reply.whole(completion.text, completion.finished))

    return router


class _Reply:
    """Builds a response object, whole or as it grows."""

    def __init__(self, service: Service, body: ResponsesBody, conversation: Conversation) -> None:
        self._body = body
        self._head = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": service.name,
        }
        self._parser = conversation.parser(style_of(service.package.template), body.parallel_tool_calls)
        self._output: list[dict[str, Any]] = []

    def whole(self, text: str, end: Finished) -> dict[str, Any]:
        content = self._parser.add(text)
        rest, calls = self._parser.finish()
        if content + rest or not calls:
            self._output.append(_message(new_id("msg"), content + rest, _status(end)))
        self._output.extend(_call(call, "completed") for call in calls)
        return self._response(end)

    async def events(self, generation: Generation) -> AsyncIterator[_Event]:
        """From ``response.created`` to ``response.completed``."""
        yield "response.created", {"response": self._response(None)}
        yield "response.in_progress", {"response": self._response(None)}
        message: _GrowingMessage | None = None
        async for _, event in generation.stream():
            if isinstance(event, Finished):
                text, calls = self._parser.finish()
            else:
                text, calls = self._parser.add(event.text), []
            last = isinstance(event, Finished)
            if message is None and (text or (last and not calls)):
                message = _GrowingMessage(len(self._output))
                for given in message.begin():
                    yield given
            if message and text:
                yield message.grow(text)
            if not isinstance(event, Finished):
                continue
            if message:
                self._output.append(message.item(_status(event)))
                for given in message.end(_status(event)):
                    yield given
            for call in calls:
                for given in self._call_events(call):
                    yield given
            yield f"response.{_status(event)}", {"response": self._response(event)}

    def _call_events(self, call: dict[str, Any]) -> list[_Event]:
        """A call is known when it is whole: its arguments come in one piece."""
        item = _call(call, "completed")
        index = len(self._output)
        self._output.append(item)
        place = {"item_id": item["id"], "output_index": index}
        done = {**place, "name": item["name"], "arguments": item["arguments"]}
        begun = {**item, "arguments": "", "status": "in_progress"}
        return [
            ("response.output_item.added", {"output_index": index, "item": begun}),
            ("response.function_call_arguments.delta", {**place, "delta": item["arguments"]}),
            ("response.function_call_arguments.done", done),
            ("response.output_item.done", {"output_index": index, "item": item}),
        ]

    def _response(self, end: Finished | None) -> dict[str, Any]:
        body = self._body
        cut = end is not None and end.reason == "length"
        choice = body.tool_choice if isinstance(body.tool_choice, str) else None
        if isinstance(body.tool_choice, NamedFunctionTool):
            choice = {"type": "function", "name": body.tool_choice.name}  # type: ignore[assignment]
        form = body.text.format if body.text else None
        given = form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}
        return {
            **self._head,
            "status": "in_progress" if end is None else _status(end),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": given},
            "tool_choice": choice or "auto",
            "tools": [_shown(tool) for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if end is None else _usage(end),
        }


class _GrowingMessage:
    """The events of a message's text."""

    def __init__(self, index: int) -> None:
        self._id = new_id("msg")
        self._index = index
        self._text = ""
        self._place = {"item_id": self._id, "output_index": index, "content_index": 0}

    def item(self, status: str) -> dict[str, Any]:
        return _message(self._id, self._text, status)

    def begin(self) -> list[_Event]:
        item = _message(self._id, None, "in_progress")
        return [
            ("response.output_item.added", {"output_index": self._index, "item": item}),
            ("response.content_part.added", {**self._place, "part": _part("")}),
        ]

    def grow(self, text: str) -> _Event:
        self._text += text
        return "response.output_text.delta", {**self._place, "delta": text, "logprobs": []}

    def end(self, status: str) -> list[_Event]:
        return [
            ("response.output_text.done", {**self._place, "text": self._text, "logprobs": []}),
            ("response.content_part.done", {**self._place, "part": _part(self._text)}),
            ("response.output_item.done", {"output_index": self._index, "item": self.item(status)}),
        ]


def _conversation(service: Service, body: ResponsesBody) -> Conversation:
    form = body.text.format if body.text else None
    return Conversation(
        messages=_messages(body),
        sampling=SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
        ),
        eos_tokens=service.package.eos_tokens,
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        choice=_choice(body),
        schema=format_schema(form.type, form.schema_, "text.format") if form else None,
        max_tokens=body.max_output_tokens,
        messages_param="input",
        format_param="text.format",
    )


def _messages(body: ResponsesBody) -> list[Message]:
    """The conversation as chat completions have it. Calls that follow one another are one message's."""
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, Message(role="user", content=body.input)]
    for number, item in enumerate(body.input):
        match item:
            case InputMessage():
                messages.append(Message(role=item.role, content=item.content))
            case InputCall():
                if not (messages and messages[-1].role == "assistant"):
                    messages.append(Message(role="assistant"))
                function = ToolCallFunction(name=item.name, arguments=item.arguments)
                call = ToolCall(id=item.call_id, function=function)
                messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
            case InputResult():
                text = text_of(item.output, f"input[{number}].output")
                messages.append(Message(role="tool", tool_call_id=item.call_id, content=text))
            case InputReasoning():
                pass
    return messages


def _tool(tool: FunctionTool) -> Tool:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return Tool(type="function", function=ToolFunction(**fields))  # type: ignore[arg-type]


def _choice(body: ResponsesBody) -> Choice:
    if isinstance(body.tool_choice, NamedFunctionTool):
        return NamedTool(type="function", function=NamedFunction(name=body.tool_choice.name))
    return body.tool_choice


def _shown(tool: FunctionTool) -> dict[str, Any]:
    """A tool as the reply repeats it."""
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict is not False,
    }


def _call(call: dict[str, Any], status: str) -> dict[str, Any]:
    return {
        "id": new_id("fc"),
        "type": "function_call",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
        "status": status,
    }


def _message(name: str, text: str | None, status: str) -> dict[str, Any]:
    content: Sequence[dict[str, Any]] = [] if text is None else [_part(text)]
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(end: Finished) -> str:
    return "incomplete" if end.reason == "length" else "completed"


def _usage(end: Finished) -> dict[str, Any]:
    return {
        "input_tokens": end.prompt_tokens,
        "input_tokens_details": {"cached_tokens": end.cached_tokens},
        "output_tokens": end.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": end.prompt_tokens + end.output_tokens,
    }
