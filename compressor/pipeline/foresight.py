"""Keeps sub-networks from being built that are surely too slow, by what was measured of others.

A handful of measurements before the search give the first predictor; every later one in the ledger
refits it. What it turns away is recorded with its estimate, as predicted and not as measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from compressor.engines.speed import SpeedEstimate, SpeedModel, fit_speed, panel
from compressor.ledger import Row
from compressor.pipeline.candidates import MEASURE, PREDICTED, Evaluator, Terms, speed_rows
from compressor.search.problem import ExactConstraint, Outcome, Problem
from compressor.space import SubNetwork

EASILY = 0.8
"""Share of the speed budgets within which the largest sub-network makes a predictor needless."""
ENOUGH = 8
"""Sub-networks measured in turns, from which on those measured alone, before turns began, are left out."""


@dataclass(frozen=True)
class Foresight:
    """The speed predictor of a search, with the budgets that it guards."""

    evaluator: Evaluator
    ttft_ms: float
    tpot_ms: float

    @property
    def terms(self) -> Terms:
        return self.evaluator.terms

    def prepare(self, problem: Problem) -> SpeedModel | None:
        """Measure about six sub-networks and fit them; None where speed cannot bind or nothing can be fitted.

        The largest is measured first: where it is well within the budgets, so is everything.
        """
        allowed = [subnet for subnet in problem.space.uniform_subnetworks() if problem.allows(subnet)]
        if not allowed or self._easily(self.evaluator.measure(max(allowed, key=problem.size))):
            return None
        return _fitted([self.evaluator.measure(subnet) for subnet in panel(problem.space, problem.allows)])

    def guarded(self, problem: Problem, model: SpeedModel) -> Problem:
        """The problem with the predicted budgets among its constraints, so that nothing over them is asked.

        Where even the smallest of the space is over them the problem stays as it is: the search then
        looks for the nearest miss.
        """
        choices = problem.space.bits, problem.space.outer_bits

        def ttft(subnet: SubNetwork) -> float:
            return model.least(subnet, *choices).lucky_ttft_ms

        def tpot(subnet: SubNetwork) -> float:
            return model.least(subnet, *choices).lucky_tpot_ms

        guards = (
            ExactConstraint("predicted TTFT", ttft, self.ttft_ms, "ms"),
            ExactConstraint("predicted TPOT", tpot, self.tpot_ms, "ms"),
        )
        trial = replace(problem, constraints=(*problem.constraints, *guards))
        return trial if trial.allows(problem.space.smallest) else problem

    def refitted(self) -> SpeedModel | None:
        """The predictor by every measurement that the ledger holds now."""
        return _fitted(speed_rows(self.evaluator.ledger, self.terms, MEASURE))

    def turned_away(self, subnet: SubNetwork, model: SpeedModel) -> Outcome | None:
        """The recorded outcome of a sub-network that is surely over a budget; None if it may be built."""
        if not model.surely_over(subnet, self.ttft_ms, self.tpot_ms):
            return None
        estimate = model.predict(subnet)
        metrics = {"ttft_ms": estimate.ttft_ms, "tpot_ms": estimate.tpot_ms}
        details = {"predicted": True, "error": model.error, "measurements": model.measurements}
        key = self.terms.predicted_key(subnet)
        row = self.evaluator.ledger.put(Row(key, subnet, metrics, "infeasible", details))
        return self._outcome(row)

    def remembered(self) -> list[tuple[int, Outcome]]:
        """What was turned away before and still would be under these budgets, with the rows' numbers."""
        rows = speed_rows(self.evaluator.ledger, self.terms, PREDICTED)
        return [(row.id, self._outcome(row)) for row in rows if self._still_over(row)]

    def _outcome(self, row: Row) -> Outcome:
        return replace(self.terms.outcome(row.subnet, (row,)), status="infeasible")

    def _still_over(self, row: Row) -> bool:
        estimate = SpeedEstimate(row.metrics["ttft_ms"], row.metrics["tpot_ms"], _detail(row, "error"))
        return estimate.lucky_ttft_ms > self.ttft_ms or estimate.lucky_tpot_ms > self.tpot_ms

    def _easily(self, row: Row) -> bool:
        within = {"ttft_ms": EASILY * self.ttft_ms, "tpot_ms": EASILY * self.tpot_ms}
        return row.status == "ok" and all(row.metrics[name] <= limit for name, limit in within.items())


def _fitted(rows: Sequence[Row]) -> SpeedModel | None:
    measured = _comparable([row for row in rows if row.status == "ok"])
    times = [_steady(measured, name) for name in ("ttft", "tpot")]
    return fit_speed([row.subnet for row in measured], *times)


def _comparable(rows: Sequence[Row]) -> Sequence[Row]:
    """Rows taken in turns once there are enough of them: others hold the machine's speed of their moment."""
    in_turns = [row for row in rows if _in_turns(row)]
    return in_turns if len({row.subnet for row in in_turns}) >= ENOUGH else rows


def _steady(rows: Sequence[Row], name: str) -> list[float]:
    """Times in ms. Of those taken in turns, as their ratio to the full super-network's, at its median time:
    on a machine whose speed changes that is what compares."""
    beside = [_detail(row, f"reference_{name}_ms") for row in rows if _in_turns(row)]
    usual = median(beside) if beside else 0.0
    return [
        usual * _detail(row, f"{name}_ratio") if _in_turns(row) else row.metrics[f"{name}_ms"] for row in rows
    ]


def _in_turns(row: Row) -> bool:
    return "tpot_ratio" in row.details


def _detail(row: Row, name: str) -> float:
    return float(str(row.details[name]))
