"""/v1/chat/completions: messages in, the assistant's message out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.body import body_of, post
from serve.conversation import Conversation, format_schema
from serve.errors import bad_request
from serve.reply import json_reply
from serve.requests import check_choices, check_model, end_tokens, new_id, sampling_params, usage_of
from serve.sampling import TokenLogprob
from serve.schemas import ChatBody
from serve.sequence import Finished
from serve.service import Completion, Generation, Service
from serve.streaming import complete_or_leave, event_stream, unless_gone
from serve.tokenizer import Tokenizer
from serve.tools import style_of


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @post(router, "/v1/chat/completions", ChatBody)
    async def create_chat_completion(
        request: Request, body: ChatBody = body_of(ChatBody, service.reading)
    ) -> Response:
        """Answer a conversation."""
        check_model(service, body.model)
        check_choices(service, body.n or 1, "n")
        conversation = _conversation(service, body)
        conversation.check()
        with service.place(conversation.count) as place:
            prepared = await unless_gone(request, conversation.prepare(service))
            generation = place.start(*prepared)
        reply = _Reply(service, body, conversation)
        if body.stream:
            return event_stream(reply.chunks(generation))
        return await json_reply(reply.whole(await complete_or_leave(request, generation)))

    return router


class _Reply:
    """Builds the reply to one request, whole or in chunks."""

    def __init__(self, service: Service, body: ChatBody, conversation: Conversation) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": service.name}
        style = style_of(service.package.template)
        self._parsers = [
            conversation.parser(style, body.parallel_tool_calls) for _ in range(conversation.count)
        ]

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
                yield self._chunk(index, {"content": content}, self._listed(event.tokens))
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

    def _listed(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Of a chunk, which is encoded at once."""
        found = self._logprobs(tokens)
        return found and {**found, "content": list(found["content"])}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": _token_entries(self._tokenizer, tokens), "refusal": None}


def _token_entries(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> Iterator[dict[str, Any]]:
    """Made one by one while they are encoded: there may be very many."""
    return (_token_entry(tokenizer, entry) for entry in tokens)


def _token_entry(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    top = [_named(tokenizer, token, logprob) for token, logprob in entry.top]
    return {**_named(tokenizer, entry.token, entry.logprob), "top_logprobs": top}


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def _conversation(service: Service, body: ChatBody) -> Conversation:
    """Raises ``ApiError`` for fields that contradict each other."""
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    form = body.response_format
    given = form and (form.json_schema.schema_ if form.json_schema else form.schema_)
    return Conversation(
        messages=body.messages,
        sampling=sampling_params(body, service.model.vocabulary),
        eos_tokens=end_tokens(service, body),
        tools=body.tools,
        choice=body.tool_choice,
        schema=format_schema(form.type, given, "response_format") if form else None,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        count=body.n or 1,
        stops=body.stop or (),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        variables=body.chat_template_kwargs,
    )
