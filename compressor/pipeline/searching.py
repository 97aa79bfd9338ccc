"""The search stage: asks an algorithm, evaluates for real, tells it; the ledger remembers all of it."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.events import CandidateEvaluated, StageProgress
from compressor.pipeline.candidates import Evaluator, Terms, numbered_outcomes
from compressor.pipeline.context import Context
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


def search(context: Context, problem: Problem, evaluator: Evaluator) -> list[Outcome]:
    """Evaluate as many sub-networks as were asked for; returns everything evaluated that the ledger knows.

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
    while (
        sum(problem.allows(o.subnet) for o in evaluated) < budget and turned_away < MOST_TURNED_AWAY * budget
    ):
        asked = algorithm.ask(1)
        if not asked:
            context.say(
                f"the search space has no more sub-networks within the budgets after {len(evaluated)}"
            )
            break
        model = foresight.refitted() if watching else None
        over = foresight.turned_away(asked[0], model) if model else None
        if over is not None:
            turned_away += 1
            algorithm.tell([over])
            continue
        outcome = evaluator(asked[0])
        evaluated.append(outcome)
        algorithm.tell([outcome])
        _announce(context, problem, evaluated, reused=False)
    if turned_away:
        context.say(f"{turned_away} sub-networks were predicted over a speed budget and not built")
    if saved := told_savings(context.ledger, evaluator.terms):
        context.say(saved)
    return evaluated


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
