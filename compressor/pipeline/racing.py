"""Races in a run: against whom a sub-network runs, and what racing saved."""

from __future__ import annotations

from compressor.ledger import Ledger
from compressor.pipeline.candidates import Terms, known_outcomes
from compressor.search.front import pareto_front
from compressor.search.problem import Problem
from compressor.space import SubNetwork


def rivals(ledger: Ledger, terms: Terms, problem: Problem, subnet: SubNetwork) -> list[bytes]:
    """Results on all items of those on the front so far that are no larger than ``subnet``."""
    size = problem.size(subnet)
    front = pareto_front(problem, known_outcomes(ledger, terms))
    rows = [ledger.get(terms.accuracy_key(o.subnet)) for o in front if problem.size(o.subnet) <= size]
    return [row.items for row in rows if row is not None and row.items is not None]


def told_savings(ledger: Ledger, terms: Terms) -> str:
    """What racing saved so far, in words; empty where nothing was raced."""
    raced = [row for row in ledger.rows(weights=terms.weights, task=terms.raced_task) if row.status == "ok"]
    if not raced:
        return ""
    full = ledger.rows(weights=terms.weights, task=terms.task_key, numerics=terms.score_numerics, engine="")
    seen, items = (sum(int(str(row.details[name])) for row in raced) for name in ("items_scored", "items"))
    total = items + len(full) * int(str(raced[0].details["items"]))
    return (
        f"racing stopped {len(raced)} of {len(raced) + len(full)} sub-networks early and saved "
        f"{(items - seen) / total:.0%} of the items"
    )
