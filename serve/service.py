"""The package at work: turns checked requests into sequences and their events into replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.errors import ApiError, bad_request
from serve.grammar import Grammars
from serve.kvcache import KeyValueCache
from serve.mailbox import Mailbox
from serve.memory import plan_cache
from serve.metrics import Metrics
from serve.model import LAYERS_EACH, Model, open_engine
from serve.package import ServedPackage, open_package
from serve.sampling import TokenLogprob
from serve.sandbox import Sandbox
from serve.scheduler import Scheduler
from serve.sequence import (
    Constraint,
    Event,
    Finished,
    GenerationRequest,
    Piece,
    SequenceState,
)
from serve.settings import Settings
from serve.threads import background

LONG_TEXT = 8192  # characters from which on tokenizing leaves the event loop
TOKENIZED_AT_ONCE = 2  # long texts
READING_SECONDS = 2.0  # of processor time: to parse a body, to render a conversation
COMPILING_SECONDS = 1.0  # to compile a grammar
LAST_SECONDS = 2.0  # of a shutdown, for errors to reach their clients


@dataclass
class Completion:
    """A finished sequence."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finished: Finished | None = None


class Service:
    """A loaded package. ``open`` its sandbox, ``drain`` and ``close`` it at the end."""

    def __init__(self, settings: Settings, shared: bool = False) -> None:
        """``shared`` after ``model.share_resources``."""
        self.settings = settings
        self.package: ServedPackage = open_package(settings.package)
        self.name = settings.model_name or self.package.manifest.name
        self.created = int(time.time())
        self.tokenizer = self.package.tokenizer
        self.reading = Sandbox(settings.package, READING_SECONDS)
        self._compiling = Sandbox(settings.package, COMPILING_SECONDS)
        self._tokenizing = background("tokenizing", TOKENIZED_AT_ONCE)
        scales = self.package.cache_scales(settings.kv_cache)
        engine = open_engine(self.package.graph, settings.threads, LAYERS_EACH, shared, scales)
        shape = engine.cache_shape(self.package.kv_heads, self.package.head_dim, 1)
        self.context, self.budget_tokens = plan_cache(
            shape.bytes_per_token,
            self.package.manifest.context_length,
            settings.sequences,
            settings.max_context,
            settings.cache_gib,
        )
        shape = engine.cache_shape(self.package.kv_heads, self.package.head_dim, self.context)
        self.model = Model(engine, KeyValueCache(shape, settings.sequences))
        self.grammars = Grammars(
            self.tokenizer.path, self.model.vocabulary, self.package.eos_tokens, self._compiling
        )
        self._mailbox = Mailbox()
        self.scheduler = Scheduler(self.model, self.budget_tokens, settings.queue_size, self._mailbox.send)
        self.metrics = Metrics(self.scheduler)
        self.scheduler.start()

    async def open(self) -> None:
        await self.reading.start()

    def drain(self) -> None:
        """Refuse what is new; what still runs shortly before the promised time is up ends with an error."""
        self.scheduler.drain()
        seconds = self.settings.drain_seconds
        delay = max(seconds - LAST_SECONDS, seconds / 2)
        asyncio.get_running_loop().call_later(delay, self.scheduler.cancel_all)

    async def close(self) -> None:
        await asyncio.to_thread(self.scheduler.close, LAST_SECONDS)
        await self.reading.close()
        await self._compiling.close()

    async def encode(
        self, text: str, add_special_tokens: bool, param: str | None = None, most: int | None = None
    ) -> list[int]:
        """Token ids, by default as many as the context holds. Raises ``ApiError``."""
        arguments = (text, add_special_tokens, most or self.context)
        try:
            if len(text) < LONG_TEXT:
                return self.tokenizer.encode(*arguments)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._tokenizing, self.tokenizer.encode, *arguments)
        except ApiError as error:
            error.param = error.param or param
            raise

    async def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        if len(ids) < LONG_TEXT:
            return self.tokenizer.decode(ids, skip_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, self.tokenizer.decode, ids, skip_special_tokens)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. Raises ``RefusalError`` where the template objects."""
        payload = {"messages": list(messages), "tools": tools and list(tools), "variables": variables}
        text: str = await self.reading.ask("render", payload)
        return text

    def check_tokens(self, prompt: Sequence[int], max_tokens: int | None, param: str) -> int:
        """How many tokens may be generated after ``prompt``. Raises ``ApiError`` if it doesn't fit."""
        if not prompt:
            raise bad_request("the prompt is empty: give at least one token", param)
        if min(prompt) < 0 or max(prompt) >= self.model.vocabulary:
            raise bad_request(f"token ids must be 0 to {self.model.vocabulary - 1}", param)
        room = self.context - len(prompt)
        if room < (1 if max_tokens is None else min(max_tokens, 1)):
            raise bad_request(
                f"the prompt has {len(prompt)} tokens and the context is {self.context}: shorten it",
                param,
                "context_length_exceeded",
            )
        return room if max_tokens is None else min(max_tokens, room)

    def deadline(self) -> float:
        return time.monotonic() + self.settings.request_timeout_seconds

    @contextmanager
    def place(self, count: int) -> Iterator[Place]:
        """Places in the queue, held while a request is prepared. Raises ``ApiError`` if it is full."""
        self.scheduler.reserve(count)
        place = Place(self, count)
        try:
            yield place
        finally:
            if not place.taken:
                self.scheduler.give_up(count)

    def start(
        self, requests: Sequence[GenerationRequest], constraints: Sequence[Constraint] = ()
    ) -> Generation:
        """Queue sequences in places held for them, with a constraint for each or none."""
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        states = [
            SequenceState(
                request,
                self.tokenizer,
                self._mailbox.sink(events.put_nowait, index),
                constraints[index] if constraints else None,
            )
            for index, request in enumerate(requests)
        ]
        self.scheduler.submit(states)
        return Generation(self, states, events)


class Place:
    """Places in the queue for one request."""

    def __init__(self, service: Service, count: int) -> None:
        self._service = service
        self._count = count
        self.taken = False

    def start(
        self, requests: Sequence[GenerationRequest], constraints: Sequence[Constraint] = ()
    ) -> Generation:
        """Let the sequences run, one for each place. Raises ``ApiError`` when the server is closing."""
        assert len(requests) == self._count
        generation = self._service.start(requests, constraints)
        self.taken = True
        return generation


class Generation:
    """Sequences that run for one request."""

    def __init__(
        self, service: Service, states: list[SequenceState], events: asyncio.Queue[tuple[int, Event]]
    ) -> None:
        self._service = service
        self._states = states
        self._events = events

    async def stream(self) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """Events by sequence until all have finished. Raises ``ApiError``; stops the work when left."""
        remaining = len(self._states)
        try:
            while remaining:
                index, event = await self._events.get()
                if isinstance(event, ApiError):
                    raise event
                if isinstance(event, Finished):
                    remaining -= 1
                    self._service.metrics.observe(self._states[index])
                yield index, event
        finally:
            if remaining:
                self.cancel()

    async def complete(self) -> list[Completion]:
        """All sequences, finished."""
        completions = [Completion() for _ in self._states]
        async for index, event in self.stream():
            if isinstance(event, Finished):
                completions[index].finished = event
                completions[index].prompt_logprobs = self._states[index].prompt_logprobs
            else:
                completions[index].text += event.text
                completions[index].tokens.extend(event.tokens)
        return completions

    def cancel(self) -> None:
        self._service.scheduler.cancel(self._states)
