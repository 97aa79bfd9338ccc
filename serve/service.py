"""The package at work: turns checked requests into sequences and their events into replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from serve.errors import ApiError, bad_request
from serve.grammar import Grammars
from serve.kvcache import KeyValueCache
from serve.mailbox import Mailbox
from serve.memory import plan_cache
from serve.metrics import Metrics
from serve.model import LAYERS_EACH, Model, open_engine
from serve.package import ServedPackage, open_package
from serve.sampling import TokenLogprob
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

LONG_TEXT = 8192  # characters from which on tokenizing leaves the event loop


@dataclass
class Completion:
    """A finished sequence."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finished: Finished | None = None


class Service:
    """A loaded package. ``open`` it, ``close`` it at the end."""

    def __init__(self, settings: Settings, shared: bool = False) -> None:
        """``shared`` after ``model.share_resources``."""
        self.settings = settings
        self.package: ServedPackage = open_package(settings.package)
        self.name = settings.model_name or self.package.manifest.name
        self.created = int(time.time())
        self.tokenizer = self.package.tokenizer
        self.grammars = Grammars(self.tokenizer, self.package.eos_tokens)
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
        self._mailbox = Mailbox()
        self.scheduler = Scheduler(self.model, self.budget_tokens, settings.queue_size, self._mailbox.send)
        self.metrics = Metrics(self.scheduler)
        self.scheduler.start()

    def close(self) -> None:
        self.scheduler.close(self.settings.drain_seconds)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

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

    def start(
        self, requests: Sequence[GenerationRequest], constraints: Sequence[Constraint] = ()
    ) -> Generation:
        """Queue sequences, with a constraint for each or none. Raises ``ApiError`` if the queue is full."""
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
