"""Evaluating one sub-network: its accuracy and its measured speed, each paid for once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from compressor.engines.memory import required_memory_bytes, shipped_weight_bytes
from compressor.errors import DeviceFaultError
from compressor.evaluation.racing import Raced
from compressor.evaluation.score import CONFIDENCE_Z, Score, paired_difference
from compressor.ledger import Key, Ledger, Row, Status
from compressor.measurement import Measurement
from compressor.pipeline.failures import EXPECTED, failed_row, kind_of
from compressor.profile import EngineName, Workload
from compressor.search.front import Tied
from compressor.search.problem import Outcome
from compressor.space import ModelShape, Numerics, SubNetwork

MEASURE = "measure"
PREDICTED = "measure:predicted"

ScoreFunction = Callable[[SubNetwork], Score]
RaceFunction = Callable[[SubNetwork], Raced]
BenchFunction = Callable[[SubNetwork], Measurement]


@dataclass(frozen=True)
class Terms:
    """On what terms a search evaluates: which weights, task, numerics, device, engine and workload."""

    shape: ModelShape
    weights: str
    task_key: str
    score_numerics: Numerics
    numerics: Numerics
    device: str
    engine: EngineName
    workload: Workload
    racing: bool = False
    free: bool = False
    """Whether ``weights`` are the unpruned model's own."""

    def of_unpruned(self, weights: str) -> Terms:
        """The same terms for the unpruned model's own weights; nothing that is free is stopped by a race."""
        return replace(self, weights=weights, racing=False, free=True)

    def accuracy_key(self, subnet: SubNetwork) -> Key:
        return Key(subnet.digest, self.weights, self.task_key, self.score_numerics)

    @property
    def raced_task(self) -> str:
        """Name of the evaluations that a race stopped early: estimates, apart from full ones."""
        return f"{self.task_key}:raced"

    def raced_key(self, subnet: SubNetwork) -> Key:
        return replace(self.accuracy_key(subnet), task=self.raced_task)

    def speed_key(self, subnet: SubNetwork) -> Key:
        return Key(
            subnet.digest, self.weights, MEASURE, self.numerics, self.device, self.engine, self.workload.key
        )

    def predicted_key(self, subnet: SubNetwork) -> Key:
        """Of a sub-network that was not built because its predicted speed breaks a budget."""
        return replace(self.speed_key(subnet), task=PREDICTED)

    def memory_bytes(self, subnet: SubNetwork) -> int:
        """Bytes that serving the workload takes."""
        return required_memory_bytes(self.shape, subnet, self.workload, self.numerics, self.engine).total

    def weight_bytes(self, subnet: SubNetwork) -> int:
        """Bytes of its weights as the package holds them."""
        return shipped_weight_bytes(self.shape, subnet, self.numerics, self.engine)

    def outcome(self, subnet: SubNetwork, rows: tuple[Row, ...]) -> Outcome:
        """The figures of both rows and those that are computed."""
        values = {
            "weight_bytes": float(self.weight_bytes(subnet)),
            "memory_bytes": float(self.memory_bytes(subnet)),
        }
        for row in rows:
            values.update(row.metrics)
        status: Status = next((row.status for row in rows if row.status != "ok"), "ok")
        return Outcome(subnet, values, status, self.free)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(replace(self, workload=None)), "workload": self.workload.model_dump()}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Terms:
        shape, workload = ModelShape(**data["shape"]), Workload(**data["workload"])
        return cls(**{**data, "shape": shape, "workload": workload})


def known_outcomes(ledger: Ledger, terms: Terms) -> list[Outcome]:
    """Every sub-network whose accuracy and speed, or failure, the ledger knows, in the order they came."""
    return [outcome for _, outcome in numbered_outcomes(ledger, terms)]


def numbered_outcomes(ledger: Ledger, terms: Terms) -> list[tuple[int, Outcome]]:
    """As ``known_outcomes``, each with the number of the row that finished it."""
    scored = {
        row.key.subnet: row
        for task in ([terms.raced_task] if terms.racing else []) + [terms.task_key]
        for row in ledger.rows(weights=terms.weights, task=task, numerics=terms.score_numerics, engine="")
    }
    found = []
    for speed in speed_rows(ledger, terms, MEASURE):
        score = scored.get(speed.key.subnet)
        if speed.status != "ok":
            found.append((speed.id, terms.outcome(speed.subnet, (speed,))))
        elif score is not None:
            found.append((max(speed.id, score.id), terms.outcome(speed.subnet, (speed, score))))
    return sorted(found, key=lambda pair: pair[0])


def speed_rows(ledger: Ledger, terms: Terms, task: str) -> list[Row]:
    """Rows of this device, engine and workload: what was measured, or what was predicted."""
    return ledger.rows(
        weights=terms.weights,
        task=task,
        numerics=terms.numerics,
        device=terms.device,
        engine=terms.engine,
        workload=terms.workload.key,
    )


def paired_ties(ledger: Ledger, terms: Callable[[Outcome], Terms]) -> Tied:
    """Ties by the items both were scored on, each on its ``terms``: the 95% interval of the paired difference
    reaches 0.

    Sub-networks are scored on the same items, so their difference is known far better than either.
    """

    def tied(one: Outcome, best: Outcome) -> bool:
        rows = [ledger.get(terms(outcome).accuracy_key(outcome.subnet)) for outcome in (best, one)]
        items = [row.items for row in rows if row is not None and row.items is not None]
        if len(items) < 2:
            return False
        difference, stderr = paired_difference(items[0], items[1])
        return difference <= CONFIDENCE_Z * stderr

    return tied


@dataclass(frozen=True)
class Evaluator:
    """Scores and measures sub-networks through the ledger; ``score`` and ``bench`` do the work.

    With ``race``, scoring stops once a sub-network is dominated; what it then has is an estimate, kept
    under a name of its own. ``make_room`` frees what else this run holds, before what memory or a worker's
    death spoiled is tried once more.
    """

    ledger: Ledger
    terms: Terms
    score: ScoreFunction
    bench: BenchFunction
    race: RaceFunction | None = None
    make_room: Callable[[], None] = lambda: None

    def __call__(self, subnet: SubNetwork) -> Outcome:
        """The outcome, from the ledger or by paying for what it lacks. A failure is recorded, not raised:
        as infeasible where the device lacks what the sub-network needs. What has no speed is not scored.

        Raises ``DeviceFaultError`` where the GPU is lost to this process; nothing is recorded then.
        """
        speed = self.measure(subnet)
        if speed.status != "ok":
            return self.terms.outcome(subnet, (speed,))
        stopped = self.ledger.get(self.terms.raced_key(subnet)) if self.race else None
        accuracy = stopped or self._row(self.terms.accuracy_key(subnet), subnet, self._scored)
        return self.terms.outcome(subnet, (speed, accuracy))

    def measure(self, subnet: SubNetwork) -> Row:
        """Its speed alone, from the ledger or measured now."""
        return self._row(self.terms.speed_key(subnet), subnet, self._measured)

    def _row(self, key: Key, subnet: SubNetwork, pay: Callable[[Key, SubNetwork], Row]) -> Row:
        known = self.ledger.get(key)
        if known is not None:
            return known
        began = time.monotonic()
        try:
            row = self._tried(key, subnet, pay)
        except EXPECTED as error:
            if kind_of(error) == "poisoned":
                first = next(iter(str(error).splitlines()))
                raise DeviceFaultError(
                    f"the GPU failed while {subnet.digest} was evaluated ({first}): everything before is "
                    "kept, go on with --resume"
                ) from error
            row = failed_row(key, subnet, error)
        return self.ledger.put(replace(row, cost_s=time.monotonic() - began))

    def _tried(self, key: Key, subnet: SubNetwork, pay: Callable[[Key, SubNetwork], Row]) -> Row:
        """Pay; once more, alone, where memory ran out or a worker died."""
        try:
            return pay(key, subnet)
        except EXPECTED as error:
            if kind_of(error) not in ("memory", "worker"):
                raise
        self.make_room()  # the error is gone by now, and with it what its frames held
        return pay(key, subnet)

    def reason(self, subnet: SubNetwork) -> str:
        """Why an evaluation failed, as the ledger has it."""
        keys = (self.terms.speed_key(subnet), self.terms.accuracy_key(subnet))
        rows = [row for row in map(self.ledger.get, keys) if row is not None and row.status != "ok"]
        return str(rows[0].details.get("error", "")) if rows else ""

    def _scored(self, key: Key, subnet: SubNetwork) -> Row:
        if self.race is None:
            score = self.score(subnet)
            return Row(key, subnet, score.metrics(), items=score.items)
        raced = self.race(subnet)
        details = {"items_scored": raced.evaluated, "items": raced.total}
        if raced.dominated_by is not None:
            return Row(self.terms.raced_key(subnet), subnet, raced.score.metrics(), details=details)
        return Row(key, subnet, raced.score.metrics(), details=details, items=raced.score.items)

    def _measured(self, key: Key, subnet: SubNetwork) -> Row:
        measured = self.bench(subnet)
        return Row(key, subnet, measured.metrics(), details=dict(measured.conditions))
