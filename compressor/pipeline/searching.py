"""The search stage: asks an algorithm, evaluates for real, tells it; the ledger remembers all of it."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.errors import StoppedError
from compressor.events import CandidateEvaluated, StageProgress
from compressor.pipeline.candidates import Evaluator, Terms, numbered_outcomes
from compressor.pipeline.context import Context
from compressor.pipeline.failures import IN_A_ROW
from compressor.pipeline.foresight import Foresight
from compressor.pipeline.racing import told_savings
from compressor.profile import Profile
from compressor.search.algorithms import make_search
from compressor.search.front import pareto_front
from compressor.search.problem import ExactConstraint, Objective, Outcome, Problem, check_feasible
from compressor.space import SearchSpace, SubNetwork

MOST_TURNED_AWAY = 20
"""Sub-networks turned away for each one to be evaluated, before a search gives up."""


def make_problem(profile: Profile, space: SearchSpace, terms: Terms) -> Problem:
    """Accuracy against bytes, within the profile's budgets."""

    def size(subnet: SubNetwork) -> float:
        return float(terms.weight_bytes(subnet))

    def memory(subnet: SubNetwork) -> float:
        return float(terms.memory_bytes(subnet))

    budgets = profile.budgets
    return Problem(
        space,
        (Objective("accuracy", maximize=True), Objective("weight_bytes")),
        exact={"weight_bytes": size},
        constraints=(ExactConstraint("memory", memory, budgets.memory_bytes, "MiB", 2**20),),
        limits={"ttft_ms": budgets.ttft_ms, "tpot_ms": budgets.tpot_ms},
    )


def search(context: Context, problem: Problem, evaluator: Evaluator, together: int = 1) -> list[Outcome]:
    """Evaluate as many sub-networks as were asked for; returns everything evaluated that the ledger knows.

    ``together`` of them are measured, then scored, before the next are asked for. Raises ``StoppedError``
    after too many failures in a row, ``DeviceFaultError`` where the GPU is lost.

    What the ledger knows already is told first and counts, so that a resumed run pays for nothing twice.
    Sub-networks whose predicted speed is surely over a budget are not built and do not count.
    """
    check_feasible(problem)
    budget = context.request.effort.evaluations
    budgets = context.request.profile.budgets
    foresight = Foresight(evaluator, budgets.ttft_ms, budgets.tpot_ms)
    first = foresight.prepare(problem)
    if first is not None:
        context.say(f"speed is predicted from {first.measurements} measurements, within {first.error:.0%}")
    guarded = foresight.guarded(problem, first) if first else problem
    watching = guarded is not problem
    algorithm = make_search(context.request.algorithm, guarded, context.request.seed)
    numbered = numbered_outcomes(context.ledger, evaluator.terms)
    evaluated = [outcome for _, outcome in numbered]
    for index in range(len(evaluated)):
        _announce(context, problem, evaluated[: index + 1], reused=True)
    remembered = foresight.remembered() if watching else []
    turned_away = len(remembered)
    algorithm.tell([outcome for _, outcome in sorted([*numbered, *remembered], key=lambda pair: pair[0])])
    failures = 0
    while (
        left := budget - sum(problem.allows(o.subnet) for o in evaluated)
    ) > 0 and turned_away < MOST_TURNED_AWAY * budget:
        asked = algorithm.ask(min(left, together))
        if not asked:
            context.say(
                f"the search space has no more sub-networks within the budgets after {len(evaluated)}"
            )
            break
        model = foresight.refitted() if watching else None
        over = {subnet: foresight.turned_away(subnet, model) for subnet in asked} if model else {}
        built = [subnet for subnet in asked if over.get(subnet) is None]
        if len(built) > 1:
            for subnet in built:
                evaluator.measure(subnet)  # all of them before the first is scored
        for subnet in asked:
            outcome = over.get(subnet)
            if outcome is not None:
                turned_away += 1
                algorithm.tell([outcome])
                continue
            outcome = evaluator(subnet)
            evaluated.append(outcome)
            algorithm.tell([outcome])
            _announce(context, problem, evaluated, reused=False)
            failures = failures + 1 if outcome.status == "failed" else 0
            _stop_after(failures, evaluator.reason(subnet))
    if turned_away:
        context.say(f"{turned_away} sub-networks were predicted over a speed budget and not built")
    if saved := told_savings(context.ledger, evaluator.terms):
        context.say(saved)
    return evaluated


def _stop_after(failures: int, reason: str) -> None:
    """Raise ``StoppedError`` after so many failures in a row."""
    if failures >= IN_A_ROW:
        raise StoppedError(
            f"{failures} sub-networks in a row could not be evaluated, the last with: {reason}. Everything "
            "is kept: mend that and go on with --resume"
        )


def _announce(context: Context, problem: Problem, told: Sequence[Outcome], reused: bool) -> None:
    latest, index = told[-1], len(told)
    front = pareto_front(problem, told)
    context.listener(
        CandidateEvaluated(
            index - 1,
            latest.subnet.to_dict(),
            dict(latest.values),
            on_front=any(o.subnet == latest.subnet for o in front),
            failed=latest.status != "ok",
            reused=reused,
        )
    )
    context.listener(StageProgress("search", index, context.request.effort.evaluations))
