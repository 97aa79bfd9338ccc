"""Which cache row a sequence gets: admission against the memory budget, prefix reuse, compaction.

Rows [0, decoding) decode together; the next [decoding, active) are being prefilled; the rest are idle
and keep what they hold, for the next prompt that begins alike.
"""

from __future__ import annotations

import time

from serve.kvcache import KeyValueCache, common_prefix
from serve.sequence import SequenceState

MIN_SHARED_TOKENS = 16


class Rows:
    """Sequences by row. ``budget_tokens`` bounds the positions of all rows together."""

    def __init__(self, cache: KeyValueCache, budget_tokens: int) -> None:
        self.cache = cache
        self.budget_tokens = budget_tokens
        self.decoding: list[SequenceState] = []
        self.prefilling: list[SequenceState] = []

    @property
    def active(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def sequences(self) -> list[SequenceState]:
        return self.decoding + self.prefilling

    def admit(self, sequence: SequenceState) -> bool:
        """Give the sequence a row if one is free and memory suffices for all that it may need."""
        if self.active >= len(self.cache.rows):
            return False
        reserved = sum(other.reserved for other in self.sequences) + sequence.reserved
        if reserved > self.budget_tokens:
            return False
        row = self._place(sequence)
        self._make_room(row, sequence)
        self.prefilling.append(sequence)
        return True

    def share_prefix(self, sequence: SequenceState) -> None:
        """Before its prefill begins: copy the prompt's beginning from a row that holds more of it."""
        row = self.row_of(sequence)
        here = len(self.cache.rows[row].tokens)
        longest, source = self._best_prefix(list(sequence.request.prompt), range(len(self.cache.rows)))
        if longest >= here + MIN_SHARED_TOKENS and source != row:
            self.cache.copy_prefix(source, row, longest)
            sequence.cached_tokens = longest

    def start_decoding(self, sequence: SequenceState) -> None:
        """Its prompt is in the cache: it joins the rows that decode."""
        row = self.row_of(sequence)
        target = len(self.decoding)
        self.cache.swap(row, target)
        index = self.prefilling.index(sequence)
        self.prefilling[index] = self.prefilling[0]
        self.prefilling.pop(0)
        self.decoding.append(sequence)

    def release(self, sequence: SequenceState) -> None:
        """The sequence leaves; its row stays as it is, idle, after the active ones."""
        row = self.row_of(sequence)
        self.cache.rows[row].last_used = time.monotonic()
        if sequence in self.decoding:
            last = len(self.decoding) - 1
            self.cache.swap(row, last)
            self.decoding[row] = self.decoding[last]
            self.decoding.pop()
            row = last
            if self.prefilling:  # the hole is before them: the last of them fills it
                self.cache.swap(row, self.active)
                self.prefilling.insert(0, self.prefilling.pop())
        else:
            last = self.active - 1
            self.cache.swap(row, last)
            self.prefilling[row - len(self.decoding)] = self.prefilling[-1]
            self.prefilling.pop()

    def row_of(self, sequence: SequenceState) -> int:
        if sequence in self.decoding:
            return self.decoding.index(sequence)
        return len(self.decoding) + self.prefilling.index(sequence)

    def drop_all(self) -> None:
        """Forget every sequence and every prefix."""
        self.decoding.clear()
        self.prefilling.clear()
        for index in range(len(self.cache.rows)):
            self.cache.drop(index)

    def _place(self, sequence: SequenceState) -> int:
        """Choose an idle row and make it the first idle one; returns it.

        One that holds the prompt's beginning and little else is taken as it is; otherwise the least useful
        is overwritten, and ``share_prefix`` may copy the beginning later.
        """
        target = self.active
        longest, source = self._best_prefix(
            list(sequence.request.prompt), range(target, len(self.cache.rows))
        )
        useful = longest >= MIN_SHARED_TOKENS and longest * 2 >= len(self.cache.rows[source].tokens)
        if useful and not sequence.request.score_prompt:
            self.cache.swap(source, target)
            del self.cache.rows[target].tokens[longest:]
            sequence.cached_tokens = longest
        else:
            self.cache.swap(self._least_useful(), target)
            self.cache.rows[target].tokens.clear()
        return target

    def _best_prefix(self, prompt: list[int], rows: range) -> tuple[int, int]:
        """The longest beginning of the prompt, less its last two tokens, that a row holds, and the row.

        Two are left because a prefill of one token goes through attention's decoding path, whose rounding
        differs; of two or more, any split gives the same logits to the last bit.
        """
        limit = prompt[:-2]
        return max((common_prefix(self.cache.rows[index].tokens, limit), index) for index in rows)

    def _least_useful(self) -> int:
        """The idle row to overwrite: an empty one, else the longest unused."""
        idle = range(self.active, len(self.cache.rows))
        return min(idle, key=lambda i: (bool(self.cache.rows[i].tokens), self.cache.rows[i].last_used))

    def _make_room(self, row: int, sequence: SequenceState) -> None:
        """Give back idle rows, longest unused first, until what is kept and what may come fit."""
        needed = max(sequence.reserved, self.cache.rows[row].touched)
        needed += sum(
            max(other.reserved, self.cache.rows[self.row_of(other)].touched) for other in self.sequences
        )
        idle = sorted(
            range(self.active + 1, len(self.cache.rows)), key=lambda i: self.cache.rows[i].last_used
        )
        kept = sum(self.cache.rows[index].touched for index in idle)
        for index in idle:
            if needed + kept <= self.budget_tokens:
                break
            kept -= self.cache.rows[index].touched
            self.cache.drop(index)
