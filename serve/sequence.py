"""One sequence being generated: from prompt tokens to the pieces of text that a client sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from serve.errors import ApiError
from serve.model import Chunk
from serve.sampling import Logits, Sampler, SamplingParams, TokenLogprob, logprob_of
from serve.stops import StopMatcher
from serve.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


class Constraint(Protocol):
    """A grammar that the text must obey."""

    def forbidden(self) -> npt.NDArray[np.bool_]: ...

    def accept(self, token: int) -> None: ...


@dataclass(frozen=True)
class GenerationRequest:
    """What one sequence is to generate. Everything is validated before it is made."""

    prompt: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    eos_tokens: frozenset[int] = frozenset()
    stops: Sequence[str] = ()
    top_logprobs: int | None = None
    score_prompt: bool = False
    score_end: bool = False  # whether a token that ends the text is among those with log-probabilities
    deadline: float = float("inf")


@dataclass(frozen=True)
class Piece:
    """Text ready to be shown, with the tokens it is made of (log-probabilities if asked for)."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a sequence."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


Event = Piece | Finished | ApiError
Sink = Callable[[Event], None]


@dataclass
class Times:
    """Monotonic seconds at which a sequence reached each state."""

    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None


class SequenceState:
    """The state of a sequence in the batching loop. Only the loop's thread changes it."""

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        sink: Sink,
        constraint: Constraint | None = None,
    ) -> None:
        self.request = request
        self.times = Times()
        self.cancelled = False
        self.cached_tokens = 0
        self.prefill_begun = False
        self.chunk: Chunk | None = None  # of the prompt, on its way through the model
        self.output: list[int] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.finished = False
        self._sink = sink
        self._constraint = constraint
        self._sampler = Sampler(request.sampling)
        self._stream = tokenizer.stream()
        self._stops = StopMatcher(request.stops)
        self._waiting: list[tuple[int, TokenLogprob]] = []  # end in the text, token
        self._text_length = self._shown_length = 0

    @property
    def reserved(self) -> int:
        """Cache positions that it may come to need."""
        return len(self.request.prompt) + self.request.max_tokens

    def advance(self, logits: Logits) -> int | None:
        """Choose the next token from logits [vocabulary]; returns it, or None if that was the end."""
        forbidden = self._constraint.forbidden() if self._constraint else None
        token = self._sampler.choose(logits, forbidden)
        self.times.last_token = time.monotonic()
        self.times.first_token = self.times.first_token or self.times.last_token
        self.output.append(token)
        if token in self.request.eos_tokens:
            if self.request.score_end:
                self._record(token, logits)
            self.finish("stop")
            return None
        if self._constraint:
            self._constraint.accept(token)
        self._show(token, logits)
        if self._stops.matched:
            self.finish("stop")
        elif len(self.output) >= self.request.max_tokens:
            self.finish("length")
        return None if self.finished else token

    def score(self, logits: Logits, token: int) -> None:
        """Record the log-probability of a prompt token given logits [vocabulary] before it."""
        self.prompt_logprobs.append(logprob_of(logits, token, self.request.top_logprobs or 0))

    def finish(self, reason: FinishReason) -> None:
        """Show what was held back and end the sequence."""
        if self.finished:
            return
        self.finished = True
        if not self._stops.matched:
            rest = self._stops.add(self._stream.flush())
            self._emit(rest if self._stops.matched else rest + self._stops.flush(), last=True)
        usage = (len(self.request.prompt), self.cached_tokens, len(self.output))
        self._sink(Finished(reason, *usage))

    def fail(self, error: ApiError) -> None:
        """End the sequence with an error."""
        if not self.finished:
            self.finished = True
            self._sink(error)

    def _show(self, token: int, logits: Logits) -> None:
        piece = self._stream.add(token)
        self._text_length += len(piece)
        self._record(token, logits)
        self._emit(self._stops.add(piece) if piece else "")

    def _record(self, token: int, logits: Logits) -> None:
        if self.request.top_logprobs is not None:
            entry = logprob_of(logits, token, self.request.top_logprobs)
            self._waiting.append((self._text_length, entry))

    def _emit(self, text: str, last: bool = False) -> None:
        """Hand over text with the tokens that end in it."""
        self._shown_length += len(text)
        if not self._waiting:
            if text:
                self._sink(Piece(text))
            return
        ready = [entry for end, entry in self._waiting if last or end <= self._shown_length]
        if not (text or ready):
            return
        self._waiting = self._waiting[len(ready) :]
        self._sink(Piece(text, tuple(ready)))
