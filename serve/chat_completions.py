"""/v1/chat/completions: messages in, the assistant's message out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve.errors import bad_request
from serve.grammar import GrammarConstraint
from serve.prompts import chat_prompt
from serve.requests import (
    check_choices,
    check_model,
    new_id,
    repeat,
    sampling_params,
    stop_strings,
    usage_of,
)
from serve.sampling import TokenLogprob
from serve.schemas import ChatBody
from serve.sequence import Finished, GenerationRequest
from serve.service import Completion, Generation, Service
from serve.streaming import complete_or_leave, event_stream
from serve.tokenizer import Tokenizer
from serve.tools import ToolParser, tool_grammar, wants_tools


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        _refuse_unsupported(service, body)
        requests = await _requests(service, body)
        constraints = await asyncio.to_thread(_constraints, service, body)
        generation = service.start(requests, constraints)
        reply = _Reply(service, body)
        if body.stream:
            return event_stream(reply.chunks(generation))
        return JSONResponse(reply.whole(await complete_or_leave(request, generation)))

    return router


class _Reply:
    """Builds the reply to one request, whole or in chunks."""

    def __init__(self, service: Service, body: ChatBody) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": service.name}
        style = service.package.template.tool_style if service.package.template else ""
        self._parsers = [ToolParser(style if wants_tools(body) else None) for _ in range(body.n or 1)]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = []
        for index, completion in enumerate(completions):
            assert completion.finished is not None
            parser = self._parsers[index]
            content = parser.add(completion.text)
            rest, calls = parser.finish()
            message: dict[str, Any] = {"role": "assistant", "content": content + rest, "refusal": None}
            if calls:
                message |= {"content": content + rest or None, "tool_calls": calls}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(completion.tokens),
                    "finish_reason": "tool_calls" if calls else completion.finished.reason,
                }
            )
        ends = [completion.finished for completion in completions if completion.finished]
        usage = usage_of(ends, self._body.n or 1)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        ends: list[Finished] = []
        for index in range(self._body.n or 1):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in generation.stream():
            if isinstance(event, Finished):
                ends.append(event)
                for chunk in self._last_chunks(index, event):
                    yield chunk
            elif (content := self._parsers[index].add(event.text)) or event.tokens:
                yield self._chunk(index, {"content": content}, self._logprobs(event.tokens))
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield {
                **self._head,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": usage_of(ends, self._body.n or 1),
            }

    def _last_chunks(self, index: int, end: Finished) -> list[dict[str, Any]]:
        rest, calls = self._parsers[index].finish()
        chunks = [self._chunk(index, {"content": rest})] if rest else []
        if calls:
            deltas = [{"index": position, **call} for position, call in enumerate(calls)]
            chunks.append(self._chunk(index, {"tool_calls": deltas}))
        chunks.append(self._chunk(index, {}, reason="tool_calls" if calls else end.reason))
        return chunks

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [_token_entry(self._tokenizer, entry) for entry in tokens], "refusal": None}


def _token_entry(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    top = [_named(tokenizer, token, logprob) for token, logprob in entry.top]
    return {**_named(tokenizer, entry.token, entry.logprob), "top_logprobs": top}


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def _refuse_unsupported(service: Service, body: ChatBody) -> None:
    check_model(service, body.model)
    check_choices(service, body.n or 1, "n")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        raise bad_request("tool_choice needs tools", "tool_choice")


def _constraints(service: Service, body: ChatBody) -> list[GrammarConstraint]:
    """One for each choice, or none. Big schemas take a while to compile."""
    grammar = _grammar(service, body)
    return [service.grammars.constraint(grammar) for _ in range(body.n or 1)] if grammar else []


def _grammar(service: Service, body: ChatBody) -> str | None:
    if wants_tools(body) and body.tool_choice not in (None, "auto"):
        if service.package.template is None:
            return None
        return tool_grammar(service.grammars, body, service.package.template.tool_style)
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return service.grammars.json_object()
    if form.json_schema is None:
        raise bad_request("response_format of type json_schema needs json_schema", "response_format")
    return service.grammars.json_schema(form.json_schema.schema_)


async def _requests(service: Service, body: ChatBody) -> list[GenerationRequest]:
    sampling = sampling_params(body, service.model.vocabulary)
    prompt = await chat_prompt(service, body.messages, body.tools if wants_tools(body) else None)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    request = GenerationRequest(
        prompt=tuple(prompt),
        sampling=sampling,
        max_tokens=service.check_tokens(prompt, wanted, "messages"),
        eos_tokens=frozenset() if body.ignore_eos else service.package.eos_tokens,
        stops=stop_strings(body),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        deadline=service.deadline(),
    )
    return repeat(request, body.n or 1)
