"""What a run found: its candidates, references and choice, read from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from compressor.engines.memory import served_memory, shipped_weight_bytes
from compressor.errors import CompressorError, InputError, RunConflictError
from compressor.ledger import open_ledger
from compressor.profile import Budgets
from compressor.report.analysis import front_candidates, planar_front
from compressor.report.data import Candidate, ReportData
from compressor.request import RunRequest, stored_request
from compressor.runfolder import RunFolder
from compressor.space import ModelShape, SearchSpace
from tui import words
from tui.charts import Sample
from tui.facts import ModelFacts

if TYPE_CHECKING:
    from compressor.search.front import Miss


def weight_budget_bytes(request: RunRequest, model: ModelFacts | None) -> float | None:
    """Bytes on disk of a sub-network that takes just the memory budget.

    Between the smallest sub-network and the whole model, memory grows in line with the bytes; where
    layers' bits can be chosen, sub-networks of the same bytes take unlike memory, and there is none.
    """
    if model is None or len(request.profile.layer_bits) > 1:
        return None
    shape, profile = model.shape, request.profile
    fractions = profile.space
    space = SearchSpace.from_fractions(shape, fractions.depth_fractions, fractions.width_fractions)
    (low, least), (high, most) = (
        (
            shipped_weight_bytes(shape, subnet, profile.numerics, profile.engine),
            served_memory(shape, subnet, profile).total,
        )
        for subnet in (space.smallest, space.full)
    )
    if most <= least:
        return None
    return max(0.0, low + (profile.budgets.memory_bytes - least) * (high - low) / (most - least))


def unpruned_samples(run: Path, request: RunRequest, model: ModelFacts | None) -> tuple[Sample, ...]:
    """The whole model in the packaged numerics, as the run measured it, scored on the search split."""
    path = run / "ledger.sqlite"
    if model is None or not path.exists():
        return ()
    shape = model.shape
    full = SearchSpace(shape, (shape.num_layers,), (shape.intermediate_size,)).full
    numerics = request.profile.numerics
    figures: dict[str, float] = {}
    try:
        with open_ledger(path) as ledger:
            for row in ledger.rows(subnet=full.digest, numerics=numerics, status="ok"):
                if "report" not in row.key.task:
                    figures.update(row.metrics)
    except CompressorError:
        return ()
    if "accuracy" not in figures:
        return ()
    size = shipped_weight_bytes(shape, full, numerics, request.profile.engine)
    return (Sample(figures["accuracy"], size, figures.get("throughput_tok_s")),)


@dataclass(frozen=True)
class Pick:
    """A sub-network to choose: the figures of the search, its memory and which budgets it meets."""

    candidate: Candidate
    memory_bytes: int | None
    met: tuple[bool, ...]
    chosen: bool

    @property
    def digest(self) -> str:
        return self.candidate.subnet.digest


@dataclass(frozen=True)
class WhatIf:
    """Other budgets: what would be chosen, or why nothing meets them."""

    digest: str | None
    text: str


class Results:
    """A finished run. Made by ``read_results``."""

    def __init__(self, run: Path, data: ReportData, request: RunRequest, shape: ModelShape | None) -> None:
        self.run = run
        self.data = data
        self.request = request
        self.shape = shape

    @property
    def winner_digest(self) -> str | None:
        return self.data.winner.subnet.digest if self.data.winner else None

    def picks(self, budgets: Budgets | None = None, also: str | None = None) -> list[Pick]:
        """The front, and the sub-network of digest ``also``, judged by budgets (the run's own by default)."""
        limits = budgets or self.request.profile.budgets
        front = front_candidates(self.data) or self._overall_front()
        wanted = {also, self.winner_digest}
        extra = [c for c in self.data.candidates if c.subnet.digest in wanted and c not in front]
        return [self._pick(c, limits) for c in better_of_each([*front, *extra])]

    def what_if(self, budgets: Budgets) -> WhatIf:
        """What the run's own rule picks under other budgets, from what was evaluated."""
        from compressor.search.front import choose_winner
        from compressor.search.problem import Outcome

        outcomes = [
            Outcome(c.subnet, self._values(c), free=c.free)
            for c in self.data.candidates
            if c.accuracy and c.speed
        ]
        limits = {
            "memory_bytes": float(budgets.memory_bytes),
            "ttft_ms": budgets.ttft_ms,
            "tpot_ms": budgets.tpot_ms,
        }
        if self.shape is None:
            return WhatIf(None, "the model is still being looked at: wait a moment")
        try:
            choice = choose_winner(outcomes, limits)
        except CompressorError as error:
            return WhatIf(None, str(error))
        if choice.winner is None:
            return WhatIf(None, "Nothing that was evaluated meets these. " + nearest_text(choice.misses))
        return WhatIf(choice.winner.subnet.digest, "")

    def _overall_front(self) -> list[Candidate]:
        """The best trade-offs of size and accuracy where nothing met the run's budgets."""
        able = [(c.weight_bytes, c.accuracy.value, c) for c in self.data.candidates if c.accuracy]
        best = planar_front([(float(size), accuracy) for size, accuracy, _ in able], smaller_x=True)
        return [c for size, accuracy, c in able if (float(size), accuracy) in best]

    def _pick(self, candidate: Candidate, budgets: Budgets) -> Pick:
        memory, speed = self._memory(candidate), candidate.speed
        met = (
            memory is not None and memory <= budgets.memory_bytes,
            speed is not None and speed.ttft_ms <= budgets.ttft_ms,
            speed is not None and speed.tpot_ms <= budgets.tpot_ms,
        )
        return Pick(candidate, memory, met, candidate.subnet.digest == self.winner_digest)

    def _memory(self, candidate: Candidate) -> int | None:
        if self.shape is None:
            return None
        profile = self.request.profile
        return served_memory(self.shape, candidate.subnet, profile).total

    def _values(self, candidate: Candidate) -> dict[str, float]:
        score, speed = candidate.accuracy, candidate.speed
        assert score is not None and speed is not None
        values = {
            "accuracy": score.value,
            "weight_bytes": float(candidate.weight_bytes),
            "memory_bytes": float(self._memory(candidate) or 0),
            "ttft_ms": speed.ttft_ms,
            "tpot_ms": speed.tpot_ms,
            "throughput_tok_s": speed.throughput_tok_s,
        }
        bounds = {"accuracy_low": score.low, "accuracy_high": score.high}
        return values | {name: value for name, value in bounds.items() if value is not None}


def read_results(run: Path, shape: ModelShape | None) -> Results:
    """The results of a finished run. Raises ``CompressorError`` where there are none or they are damaged."""
    folder = RunFolder.open_existing(run)
    try:
        data = TypeAdapter(ReportData).validate_json(folder.front.read_bytes())
    except OSError:
        raise InputError(f"{run} has no result yet: let the run go to its end") from None
    except ValidationError as error:
        raise RunConflictError(
            f"{folder.front} is damaged ({error.error_count()} errors): let the run go on, it writes it again"
        ) from None
    return Results(run, data, stored_request(folder), shape)


def better_of_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One for each architecture, in their order: with the unpruned model's weights or the super-network's,
    whichever is more accurate, as a pick by its name is."""
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        known = best.setdefault(candidate.subnet.digest, candidate)
        if _value(candidate) > _value(known):
            best[candidate.subnet.digest] = candidate
    return list(best.values())


def _value(candidate: Candidate) -> float:
    return candidate.accuracy.value if candidate.accuracy else 0.0


def sample_of(candidate: Candidate) -> Sample:
    score, speed = candidate.accuracy, candidate.speed
    return Sample(
        score.value if score else None, candidate.weight_bytes, speed.throughput_tok_s if speed else None
    )


def reference_samples(data: ReportData) -> tuple[Sample, ...]:
    """The whole model in the numerics that the run packages, on the search split as the candidates are."""
    reference = data.reference(data.numerics)
    if reference is None:
        return ()
    score, speed = reference.search_accuracy, reference.speed
    return (
        Sample(
            score.value if score else None, reference.weight_bytes, speed.throughput_tok_s if speed else None
        ),
    )


def nearest_text(misses: tuple[Miss, ...]) -> str:
    """``The nearest is 4.2% over on time per token (42 ms).``"""
    names = {
        "memory_bytes": ("memory", words.size),
        "ttft_ms": ("first token", words.milliseconds),
        "tpot_ms": ("each token", words.milliseconds),
    }
    parts = [f"{names[m.name][0]} at {names[m.name][1](m.value)}, {m.excess:.0%} over" for m in misses]
    return f"The nearest misses {' and '.join(parts)}."
