"""/v1/responses in its text form: input and instructions in, one message out; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve.errors import ApiError
from serve.prompts import chat_prompt
from serve.requests import check_model, new_id
from serve.sampling import SamplingParams
from serve.schemas import Message, ResponsesBody
from serve.sequence import Finished, GenerationRequest
from serve.service import Generation, Service
from serve.streaming import complete_or_leave, encode_event


def response_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses")
    async def create_response(body: ResponsesBody, request: Request) -> Response:
        """Answer in text."""
        check_model(service, body.model)
        generation = service.start([await _request(service, body)])
        reply = _Reply(service, body)
        if body.stream:
            return StreamingResponse(
                _events(reply, generation),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        (completion,) = await complete_or_leave(request, generation)
        return JSONResponse(reply.response(completion.text, completion.finished))

    return router


class _Reply:
    """Builds a response object as it grows."""

    def __init__(self, service: Service, body: ResponsesBody) -> None:
        self._body = body
        self._head = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": service.name,
        }
        self.item_id = new_id("msg")

    def response(self, text: str, end: Finished | None) -> dict[str, Any]:
        cut = end is not None and end.reason == "length"
        return {
            **self._head,
            "status": "in_progress" if end is None else "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "metadata": {},
            "output": [] if end is None else [self.item(text, "incomplete" if cut else "completed")],
            "parallel_tool_calls": False,
            "temperature": self._body.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": self._body.top_p,
            "usage": None if end is None else _usage(end),
        }

    def item(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [part(text)]
        return {
            "id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content
        }  # fmt: skip


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _request(service: Service, body: ResponsesBody) -> GenerationRequest:
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        messages.append(Message(role="user", content=body.input))
    else:
        messages.extend(Message(role=item.role, content=item.content) for item in body.input)
    prompt = await chat_prompt(service, messages)
    return GenerationRequest(
        prompt=tuple(prompt),
        sampling=SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
        ),
        max_tokens=service.check_tokens(prompt, body.max_output_tokens, "input"),
        eos_tokens=service.package.eos_tokens,
        deadline=service.deadline(),
    )


async def _events(reply: _Reply, generation: Generation) -> AsyncIterator[bytes]:
    """The stream: typed events, numbered, from ``response.created`` to ``response.completed``."""
    number = 0
    async for kind, fields in _event_values(reply, generation):
        value = {"type": kind, "sequence_number": number, **fields}
        yield f"event: {kind}\n".encode() + encode_event(value)
        number += 1


async def _event_values(reply: _Reply, generation: Generation) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    place = {"item_id": reply.item_id, "output_index": 0, "content_index": 0}
    text = ""
    yield "response.created", {"response": reply.response("", None)}
    yield "response.in_progress", {"response": reply.response("", None)}
    yield "response.output_item.added", {"output_index": 0, "item": reply.item(None, "in_progress")}
    yield "response.content_part.added", {**place, "part": part("")}
    try:
        async for _, event in generation.stream():
            if not isinstance(event, Finished):
                text += event.text
                yield "response.output_text.delta", {**place, "delta": event.text, "logprobs": []}
                continue
            status = "incomplete" if event.reason == "length" else "completed"
            yield "response.output_text.done", {**place, "text": text, "logprobs": []}
            yield "response.content_part.done", {**place, "part": part(text)}
            yield "response.output_item.done", {"output_index": 0, "item": reply.item(text, status)}
            yield f"response.{status}", {"response": reply.response(text, event)}
    except ApiError as error:
        yield "error", {"code": error.code, "message": error.message, "param": error.param}


def _usage(end: Finished) -> dict[str, Any]:
    return {
        "input_tokens": end.prompt_tokens,
        "input_tokens_details": {"cached_tokens": end.cached_tokens},
        "output_tokens": end.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": end.prompt_tokens + end.output_tokens,
    }
