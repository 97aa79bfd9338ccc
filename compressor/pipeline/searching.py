"""The search stage: asks an algorithm, evaluates for real, tells it; the ledger remembers all of it."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.events import CandidateEvaluated, StageProgress
from compressor.pipeline.candidates import Evaluator, Terms, known_outcomes
from compressor.pipeline.context import Context
from compressor.profile import Profile
from compressor.search.algorithms import make_search
from compressor.search.front import pareto_front
from compressor.search.problem import ExactConstraint, Objective, Outcome, Problem, check_feasible
from compressor.space import SearchSpace, SubNetwork, weight_bytes


def make_problem(profile: Profile, space: SearchSpace, terms: Terms) -> Problem:
    """Accuracy against bytes, within the profile's budgets."""

    def size(subnet: SubNetwork) -> float:
        return float(weight_bytes(space.shape, subnet, profile.numerics))

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
    """Evaluate as many sub-networks as were asked for; returns everything the ledger then knows.

    What the ledger knows already is told first and counts, so that a resumed run pays for nothing twice.
    """
    check_feasible(problem)
    budget = context.request.effort.evaluations
    algorithm = make_search(context.request.algorithm, problem, context.request.seed)
    told = known_outcomes(context.ledger, evaluator.terms)
    for index in range(len(told)):
        _announce(context, problem, told[: index + 1], reused=True)
    algorithm.tell(told)
    while sum(problem.allows(o.subnet) for o in told) < budget:
        asked = algorithm.ask(1)
        if not asked:
            context.say(f"the search space has no more sub-networks within the budgets after {len(told)}")
            break
        outcome = evaluator(asked[0])
        told.append(outcome)
        algorithm.tell([outcome])
        _announce(context, problem, told, reused=False)
    return told


def _announce(context: Context, problem: Problem, told: Sequence[Outcome], reused: bool) -> None:
    latest, index = told[-1], len(told)
    front = pareto_front(problem, told)
    context.listener(
        CandidateEvaluated(
            index - 1,
            latest.subnet.to_dict(),
            dict(latest.values),
            on_front=any(o.subnet == latest.subnet for o in front),
            failed=latest.status == "failed",
            reused=reused,
        )
    )
    context.listener(StageProgress("search", index, context.request.effort.evaluations))
