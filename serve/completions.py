"""/v1/completions: text or tokens in, text out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.body import body_of, post
from serve.errors import bad_request
from serve.reply import json_reply
from serve.requests import (
    check_choices,
    check_model,
    end_tokens,
    new_id,
    repeat,
    sampling_params,
    usage_of,
)
from serve.sampling import TokenLogprob
from serve.schemas import CompletionBody
from serve.sequence import Finished, GenerationRequest
from serve.service import Completion, Generation, Service
from serve.streaming import complete_or_leave, event_stream, unless_gone
from serve.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @post(router, "/v1/completions", CompletionBody)
    async def create_completion(
        request: Request, body: CompletionBody = body_of(CompletionBody, service.reading)
    ) -> Response:
        """Continue text."""
        _refuse_unsupported(service, body)
        with service.place(_sequences(service, body)) as place:
            requests = await unless_gone(request, _prepare(service, body))
            generation = place.start(requests)
        reply = _Reply(service, body, requests)
        if body.stream:
            return event_stream(reply.chunks(generation))
        return await json_reply(reply.whole(await complete_or_leave(request, generation)))

    return router


class _Reply:
    """Builds the reply to one request, whole or in chunks."""

    def __init__(self, service: Service, body: CompletionBody, requests: Sequence[GenerationRequest]) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._requests = requests
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }
        self._offsets = [0] * len(requests)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = []
        for index, completion in enumerate(completions):
            assert completion.finished is not None
            text, tokens = completion.text, list[TokenLogprob | None](completion.tokens)
            ids = [entry.token for entry in completion.tokens]
            if self._body.echo:
                prompt = list(self._requests[index].prompt)
                text = self._tokenizer.decode(prompt) + text
                tokens, ids = completion.prompt_logprobs + tokens, prompt + ids
            choices.append(self._choice(index, text, tokens, ids, completion.finished.reason))
        ends = [completion.finished for completion in completions if completion.finished]
        return {**self._head, "choices": choices, "usage": usage_of(ends, self._body.n or 1)}

    async def chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        ends: list[Finished | None] = [None] * len(self._requests)
        if self._body.echo:
            for index, request in enumerate(self._requests):
                text = self._tokenizer.decode(list(request.prompt))
                yield {**self._head, "choices": [self._choice(index, text, [], [], None)]}
        async for index, event in generation.stream():
            if isinstance(event, Finished):
                ends[index] = event
                choice = self._choice(index, "", [], [], event.reason)
            else:
                ids = [entry.token for entry in event.tokens]
                choice = self._choice(index, event.text, list(event.tokens), ids, None)
                if choice["logprobs"]:  # a chunk is encoded at once
                    choice["logprobs"] = {name: list(given) for name, given in choice["logprobs"].items()}
            yield {**self._head, "choices": [choice]}
        if self._body.stream_options and self._body.stream_options.include_usage:
            finished = [end for end in ends if end is not None]
            yield {**self._head, "choices": [], "usage": usage_of(finished, self._body.n or 1)}

    def _choice(
        self, index: int, text: str, tokens: list[TokenLogprob | None], ids: list[int], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None and ids:
            logprobs = _logprobs(self._tokenizer, tokens, ids, self._offsets[index])
        self._offsets[index] += len(text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(
    tokenizer: Tokenizer, tokens: list[TokenLogprob | None], ids: list[int], offset: int
) -> dict[str, Any]:
    """The four parallel lists of OpenAI's first API, made one by one while they are encoded: there may be
    very many. The first token of a prompt has no probability."""
    return {
        "tokens": (token_name(tokenizer, token) for token in ids),
        "token_logprobs": (entry and entry.logprob for entry in tokens),
        "top_logprobs": (
            entry and {token_name(tokenizer, token): value for token, value in entry.top} for entry in tokens
        ),
        "text_offset": _offsets(tokenizer, ids, offset),
    }


def _offsets(tokenizer: Tokenizer, ids: list[int], offset: int) -> Iterator[int]:
    for token in ids:
        yield offset
        offset += len(tokenizer.decode([token]))


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is part of a character, by its bytes."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _refuse_unsupported(service: Service, body: CompletionBody) -> None:
    check_model(service, body.model)
    if body.suffix:
        raise bad_request("suffix (infilling) is not supported: leave it out", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad_request("best_of other than n is not supported: use n", "best_of")
    if body.echo and body.stream and body.logprobs is not None:
        raise bad_request("echo with logprobs can't be streamed: set stream to false", "stream")


def _sequences(service: Service, body: CompletionBody) -> int:
    """How many places in the queue it takes. Raises ``ApiError`` for more than there are."""
    if not body.prompt:
        raise bad_request("the prompt is empty: give at least one token", "prompt")
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    count = (1 if one else len(body.prompt)) * (body.n or 1)
    check_choices(service, count, "prompt")
    return count


async def _prepare(service: Service, body: CompletionBody) -> list[GenerationRequest]:
    return _requests(service, body, await _prompts(service, body))


async def _prompts(service: Service, body: CompletionBody) -> list[list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    return [
        await service.encode(item, True, "prompt") if isinstance(item, str) else list(item) for item in prompt
    ]


def _requests(
    service: Service, body: CompletionBody, prompts: Sequence[list[int]]
) -> list[GenerationRequest]:
    sampling = sampling_params(body, service.model.vocabulary)
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    deadline = service.deadline()
    requests = []
    for prompt in prompts:
        request = GenerationRequest(
            prompt=tuple(prompt),
            sampling=sampling,
            max_tokens=service.check_tokens(prompt, wanted, "prompt"),
            eos_tokens=end_tokens(service, body),
            stops=body.stop or (),
            top_logprobs=body.logprobs,
            score_prompt=bool(body.echo) and body.logprobs is not None,
            score_end=True,
            deadline=deadline,
        )
        requests.extend(repeat(request, body.n or 1))
    return requests
