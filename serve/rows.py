"""Which cache row a sequence gets: admission against the memory budget, prefix reuse, neighbourhood.

The active rows lie side by side, those that decode before those being prefilled, and may begin at any
row; the others are idle and keep what they hold, for the next prompt that begins alike. The active rows
grow at either end, over idle ones: moving what those hold would take longer than it is worth.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from serve.kvcache import KeyValueCache, common_prefix
from serve.sequence import SequenceState

MIN_SHARED_TOKENS = 16


class Rows:
    """Sequences by row. ``budget_tokens`` bounds the positions of all rows together."""

    def __init__(self, cache: KeyValueCache, budget_tokens: int) -> None:
        self.cache = cache
        self.budget_tokens = budget_tokens
        self.first = 0  # of the active rows
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
        self._take(self._choose(sequence), sequence)
        self._make_room()
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
        self.cache.swap(self.row_of(sequence), self.first + len(self.decoding))
        index = self.prefilling.index(sequence)
        self.prefilling[index] = self.prefilling[0]
        self.prefilling.pop(0)
        self.decoding.append(sequence)

    def release(self, sequence: SequenceState) -> None:
        """The sequence leaves; its row stays as it is, idle, before or after the active ones."""
        row = self.row_of(sequence)
        self.cache.rows[row].last_used = time.monotonic()
        self.cache.rows[row].pending = 0
        if row == self.first:
            (self.decoding or self.prefilling).pop(0)
            self.first += 1
            return
        if sequence in self.decoding:
            last = self.first + len(self.decoding) - 1
            self.cache.swap(row, last)
            self.decoding[row - self.first] = self.decoding[-1]
            self.decoding.pop()
            if self.prefilling:  # the hole is before them: the last of them fills it
                self.cache.swap(last, last + len(self.prefilling))
                self.prefilling.insert(0, self.prefilling.pop())
        else:
            self.cache.swap(row, self.first + self.active - 1)
            self.prefilling[self.prefilling.index(sequence)] = self.prefilling[-1]
            self.prefilling.pop()

    def row_of(self, sequence: SequenceState) -> int:
        if sequence in self.decoding:
            return self.first + self.decoding.index(sequence)
        return self.first + len(self.decoding) + self.prefilling.index(sequence)

    def drop_all(self) -> None:
        """Forget every sequence and every prefix."""
        self.decoding.clear()
        self.prefilling.clear()
        for index in range(len(self.cache.rows)):
            self.cache.drop(index)

    def _choose(self, sequence: SequenceState) -> int:
        """An idle row that the active ones can grow to: one that holds the prompt's beginning and little
        else, or the least useful. What it has of the beginning stays; ``share_prefix`` may copy more.
        """
        ends, prompt = self._ends(), list(sequence.request.prompt)
        longest, row = self._best_prefix(prompt, ends)
        if longest < MIN_SHARED_TOKENS or longest * 2 < len(self.cache.rows[row].tokens):
            row = min(ends, key=self._usefulness)
            longest, _ = self._best_prefix(prompt, [row])
        kept = longest if longest >= MIN_SHARED_TOKENS and not sequence.request.score_prompt else 0
        del self.cache.rows[row].tokens[kept:]
        sequence.cached_tokens = kept
        return row

    def _take(self, row: int, sequence: SequenceState) -> None:
        """Grow to an idle row; where that is before the others, what decodes is kept first."""
        if self.active and row > self.first:
            self.prefilling.append(sequence)
            return
        self.first = row
        if self.decoding:  # the last of them changes places with the new one
            self.cache.swap(row, row + len(self.decoding))
            self.decoding.insert(0, self.decoding.pop())
        self.prefilling.insert(0, sequence)

    def _ends(self) -> list[int]:
        """The idle rows next to the active ones; all, if none is active."""
        if not self.active:
            return list(range(len(self.cache.rows)))
        return [end for end in (self.first + self.active, self.first - 1) if 0 <= end < len(self.cache.rows)]

    def _idle(self) -> list[int]:
        active = range(self.first, self.first + self.active)
        return [index for index in range(len(self.cache.rows)) if index not in active]

    def _usefulness(self, row: int) -> tuple[bool, float]:
        """Of an idle row's contents: more if there are any, and if they were used lately."""
        entry = self.cache.rows[row]
        return bool(entry.tokens), entry.last_used

    def _best_prefix(self, prompt: list[int], rows: Sequence[int]) -> tuple[int, int]:
        """The longest beginning of the prompt, less its last two tokens, that a row holds, and the row.

        Two are left because a prefill of one token goes through attention's decoding path, whose rounding
        differs; of two or more, any split gives the same logits to the last bit, whatever the cache keeps.
        """
        limit = prompt[:-2]
        return max((common_prefix(self.cache.rows[index].tokens, limit), index) for index in rows)

    def _make_room(self) -> None:
        """Give back idle rows, longest unused first, until what is kept and what may come fit."""
        rows = {self.row_of(sequence): sequence for sequence in self.sequences}
        needed = sum(max(entry.reserved, self.cache.rows[row].touched) for row, entry in rows.items())
        idle = sorted(self._idle(), key=lambda i: self.cache.rows[i].last_used)
        kept = sum(self.cache.rows[index].touched for index in idle)
        for index in idle:
            if needed + kept <= self.budget_tokens:
                return
            kept -= self.cache.rows[index].touched
            self.cache.drop(index)
        if needed > self.budget_tokens:  # what longer sequences left in the active rows
            for row in rows:
                self.cache.trim(row)
