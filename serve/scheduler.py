"""The batching loop: one thread owns the model, and requests join and leave between tokens.

A turn works on the oldest prompt for as long as running sequences may wait for it (pace.py), then decodes
one token of each of them. Prompts that come together are read before any of them goes on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serve.errors import ApiError
from serve.model import Chunk, Model
from serve.pace import Pace, steady_size
from serve.rows import Rows
from serve.sampling import Logits
from serve.sequence import SequenceState

log = logging.getLogger("serve.scheduler")

SCORED_CHUNK_TOKENS = 64  # logits of every position are kept: vocabulary x 4 bytes a token
SCORED_BESIDE_TOKENS = 16  # while others wait: each position costs a look at the whole vocabulary


def _urgency(sequence: SequenceState) -> tuple[bool, float]:
    """Who is read first: scoring a prompt takes so long that the others would wait for minutes."""
    return sequence.request.score_prompt, sequence.times.submitted


@dataclass
class Counters:
    """What happened since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0


class Scheduler:
    """Runs sequences to their end. ``start`` it, ``submit`` from any thread, ``close`` it.

    ``after_turn`` is called on the batching thread once the sequences' sinks have got a turn's events.
    """

    def __init__(
        self,
        model: Model,
        budget_tokens: int,
        queue_limit: int,
        after_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self.rows = Rows(model.cache, budget_tokens)
        self.counters = Counters()
        self._model = model
        self._queue_limit = queue_limit
        self._waiting: deque[SequenceState] = deque()
        self._reserved = 0  # places of requests that are being prepared
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="batching", daemon=True)
        self._pace = Pace()
        self._after_turn = after_turn

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return self.rows.active

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        self._thread.start()

    def reserve(self, count: int) -> None:
        """Hold places for sequences yet to be prepared, which costs time too; ``submit`` or ``give_up`` them.

        Raises ``ApiError`` 429 if the queue is full, 503 when closing.
        """
        with self._changed:
            self._refuse_when_closing()
            free = len(self._model.cache.rows) - self.rows.active
            waiting = len(self._waiting) + self._reserved
            if waiting + count > self._queue_limit + max(free, 0):
                raise ApiError(
                    429,
                    f"{waiting} requests wait already: try again later",
                    code="queue_full",
                    retry_after_seconds=self._expected_wait_seconds(),
                )
            self._reserved += count

    def give_up(self, count: int) -> None:
        """Places that nothing came for."""
        with self._changed:
            self._reserved -= count

    def submit(self, sequences: list[SequenceState]) -> None:
        """Queue sequences in places that were reserved for them. Raises ``ApiError`` 503 when closing."""
        with self._changed:
            self._refuse_when_closing()
            self._reserved -= len(sequences)
            self._waiting.extend(sequences)
            self._changed.notify()

    def cancel(self, sequences: list[SequenceState]) -> None:
        """Stop sequences at the next token; harmless for finished ones."""
        for sequence in sequences:
            sequence.cancelled = True
        with self._changed:
            self._changed.notify()

    def drain(self) -> None:
        """Refuse what is new; what runs goes on."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def cancel_all(self) -> None:
        """End what runs and what waits with an error."""
        self.cancel([*self._waiting, *self.rows.sequences])

    def close(self, seconds: float) -> None:
        """End everything, waiting up to ``seconds`` for the thread to notice."""
        self.drain()
        self.cancel_all()
        self._thread.join(seconds)

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise ApiError(503, "the server is shutting down: ask another one")

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self.rows.active or self._closing):
                    self._changed.wait()
                if self._closing and not (self._waiting or self.rows.active):
                    return
            try:
                self._turn()
            except Exception as error:
                log.exception("a batching step failed")
                self._fail_all(error)
            self._after_turn()

    def _turn(self) -> None:
        self._reap()
        self._admit()
        if self.rows.prefilling:
            self._prefill(min(self.rows.prefilling, key=_urgency))
            self._admit()  # what came meanwhile
        if self.rows.decoding and not self._only_begun():
            self._decode()

    def _only_begun(self) -> bool:
        """Whether all that could decode have one token so far, and wait for prompts yet to be read."""
        begun, unread = self.rows.decoding, self.rows.prefilling
        if not unread or any(len(sequence.output) > 1 for sequence in begun):
            return False
        first = min((sequence.times.first_token or 0.0 for sequence in begun), default=math.inf)
        return self._pace.worth_waiting(time.monotonic() - first, sum(map(self._unread, unread)))

    def _unread(self, sequence: SequenceState) -> int:
        """Tokens of its prompt that are not in the cache yet."""
        return len(sequence.request.prompt) - len(self._model.cache.rows[self.rows.row_of(sequence)].tokens)

    def _reap(self) -> None:
        """Let go of sequences whose client left or whose time is up."""
        now = time.monotonic()
        for sequence in self.rows.sequences:
            if self._ended(sequence, now):
                self.rows.release(sequence)
        if self._waiting:
            with self._changed:
                self._waiting = deque(item for item in self._waiting if not self._ended(item, now))

    def _ended(self, sequence: SequenceState, now: float) -> bool:
        if sequence.cancelled:
            self.counters.cancelled += 1
            sequence.fail(ApiError(503, "the server is shutting down: ask another one"))
        elif now > sequence.request.deadline:
            self.counters.timed_out += 1
            sequence.fail(ApiError(408, "the request took longer than the server allows: ask for less"))
        return sequence.finished

    def _admit(self) -> None:
        if not self._waiting:
            return
        with self._changed:
            while self._waiting and self.rows.admit(self._waiting[0]):
                self._waiting.popleft()

    def _prefill(self, sequence: SequenceState) -> None:
        """Work on the prompt for as long as others may wait; a chunk may be left between two parts."""
        if not sequence.prefill_begun:
            self._begin_prefill(sequence)
        waiting = 0 if self._only_begun() else len(self.rows.decoding)
        reading = len(self.rows.prefilling)
        allowed = self._pace.allowed_seconds(waiting, reading)
        spent, seconds = 0.0, 0.0
        while spent + seconds <= allowed:
            chunk = sequence.chunk = sequence.chunk or self._next_chunk(sequence, waiting)
            began = time.monotonic()
            logits = self._model.advance(self.rows.row_of(sequence), chunk)
            seconds = time.monotonic() - began
            spent += seconds
            self._pace.read(len(chunk.ids), seconds, waiting, reading, self._model.parts)
            if logits is not None:
                sequence.chunk = None
                if self._end_chunk(sequence, chunk, logits) or not waiting:
                    return

    def _next_chunk(self, sequence: SequenceState, waiting: int) -> Chunk:
        prompt, unread = sequence.request.prompt, self._unread(sequence)
        done = len(prompt) - unread
        size = steady_size(self._chunk_tokens(sequence, waiting), unread)
        return Chunk(prompt[done : done + size], every=sequence.request.score_prompt)

    def _end_chunk(self, sequence: SequenceState, chunk: Chunk, logits: Logits) -> bool:
        """The chunk is in the cache; after the last one choose the first token. Whether it was the last."""
        prompt = sequence.request.prompt
        done = len(self._model.cache.rows[self.rows.row_of(sequence)].tokens)
        self.counters.prompt_tokens += len(chunk.ids)
        if sequence.request.score_prompt:
            following = prompt[done - len(chunk.ids) + 1 : done + 1]
            for offset, token in enumerate(following):
                sequence.score(logits[offset], token)
        if done < len(prompt):
            return False
        self.rows.start_decoding(sequence)
        if sequence.request.max_tokens:
            self._advance(sequence, logits[-1])
        else:
            sequence.finish("length")
            self.rows.release(sequence)
        return True

    def _begin_prefill(self, sequence: SequenceState) -> None:
        sequence.prefill_begun = True
        if not sequence.request.score_prompt:
            self.rows.share_prefix(sequence)
        self.counters.cached_tokens += sequence.cached_tokens

    def _chunk_tokens(self, sequence: SequenceState, waiting: int) -> int:
        tokens = self._pace.chunk(waiting, len(self.rows.prefilling))
        if sequence.request.score_prompt:
            most = SCORED_BESIDE_TOKENS if waiting else SCORED_CHUNK_TOKENS
            return min(tokens, most) if self._model.scores_chunks else 1
        return tokens

    def _decode(self) -> None:
        """One token for every running sequence."""
        sequences = list(self.rows.decoding)
        began = time.monotonic()
        logits = self._model.decode([sequence.output[-1] for sequence in sequences], self.rows.first)
        self._pace.decoded(time.monotonic() - began, len(sequences), bool(self.rows.prefilling))
        self.counters.steps += 1
        for sequence, row in reversed(list(zip(sequences, logits, strict=True))):
            self._advance(sequence, row)  # from the last on: where several leave at once, none need move up

    def _advance(self, sequence: SequenceState, logits: Logits) -> None:
        """Choose a sequence's next token; one that can't go on leaves, the others don't notice."""
        try:
            sequence.advance(logits)
        except ApiError as error:  # a grammar that can't be followed any further
            self.counters.failed += 1
            sequence.fail(error)
        except Exception as error:
            log.exception("choosing a token failed")
            self.counters.failed += 1
            sequence.fail(ApiError(500, f"choosing a token failed: {error}"))
        self.counters.output_tokens += 1
        if sequence.finished:
            self.rows.release(sequence)

    def _fail_all(self, error: Exception) -> None:
        for sequence in self.rows.sequences:
            self.counters.failed += 1
            sequence.fail(ApiError(500, f"the engine failed: {(str(error).splitlines() or ['?'])[0]}"))
        self.rows.drop_all()

    def _expected_wait_seconds(self) -> int:
        """A guess for Retry-After: the tokens that the queue may yet ask for, at the present speed."""
        tokens = sum(item.request.max_tokens for item in self._waiting) / max(1, len(self._model.cache.rows))
        return min(60, max(1, round(tokens * self._pace.decode_seconds)))
