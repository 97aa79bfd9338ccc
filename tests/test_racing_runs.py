"""Races in a run: estimates kept apart from full evaluations, nothing paid twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor.evaluation.racing import Raced
from compressor.evaluation.score import Items, Score
from compressor.ledger import Ledger
from compressor.measurement import Measurement
from compressor.pipeline.candidates import Evaluator, Terms, known_outcomes
from compressor.pipeline.racing import rivals, told_savings
from compressor.profile import Profile, load_profile
from compressor.request import RunRequest, with_flags
from compressor.search.problem import Objective, Problem
from compressor.space import ModelShape, SearchSpace, SubNetwork, parameter_count

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=512,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
SPACE = SearchSpace(SHAPE, (2, 4), (64, 128))
WEAK, STRONG = SPACE.full, SPACE.uniform(2, 64)
"""The larger one is the less accurate here, so that the smaller dominates it."""
ACCURATE = {WEAK: np.repeat([1.0, 0.0], [10, 54]), STRONG: np.repeat([1.0, 0.0], [40, 24])}


@pytest.fixture
def profile() -> Profile:
    return load_profile("starter-cpu")


def terms_of(profile: Profile, racing: bool) -> Terms:
    return Terms(SHAPE, "weights", "task", "fp32", "int8", "cpu", "engine", profile.workload, racing)


def problem_of(terms: Terms) -> Problem:
    size = {"parameters": lambda subnet: float(parameter_count(terms.shape, subnet))}
    return Problem(SPACE, (Objective("accuracy", maximize=True), Objective("parameters")), exact=size)


def evaluator_of(ledger: Ledger, terms: Terms, paid: list[SubNetwork]) -> Evaluator:
    """Scores as the table above says, in a race that judges after half of the items."""

    def score(subnet: SubNetwork) -> Score:
        paid.append(subnet)
        return Items(ACCURATE[subnet]).score()

    def race(subnet: SubNetwork) -> Raced:
        against = rivals(ledger, terms, problem_of(terms), subnet)
        if not against:
            return Raced(score(subnet), None, 64, 64)
        paid.append(subnet)
        return Raced(Score(0.2, 0.05, 0.1, 0.3, 32), 0, 32, 64)

    def bench(subnet: SubNetwork) -> Measurement:
        return Measurement(1.0, 1.0, 1.0, conditions={"subnet": subnet.digest})

    return Evaluator(ledger, terms, score, bench, race if terms.racing else None)


def test_a_stopped_race_is_an_estimate_under_a_name_of_its_own(tmp_path: Path, profile: Profile) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    terms = terms_of(profile, racing=True)
    paid: list[SubNetwork] = []
    evaluator = evaluator_of(ledger, terms, paid)
    first, second = evaluator(STRONG), evaluator(WEAK)
    assert first.values["accuracy"] == 40 / 64
    assert second.values["accuracy"] == 0.2
    assert ledger.get(terms.accuracy_key(WEAK)) is None
    assert told_savings(ledger, terms) == (
        "racing stopped 1 of 2 sub-networks early and saved 25% of the items"
    )
    evaluator(WEAK), evaluator(STRONG)
    assert paid == [STRONG, WEAK]


def test_without_racing_an_estimate_is_scored_in_full(tmp_path: Path, profile: Profile) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    racing, whole = terms_of(profile, racing=True), terms_of(profile, racing=False)
    evaluator = evaluator_of(ledger, racing, [])
    evaluator(STRONG), evaluator(WEAK)
    assert {o.subnet for o in known_outcomes(ledger, racing)} == {STRONG, WEAK}
    assert {o.subnet for o in known_outcomes(ledger, whole)} == {STRONG}
    paid: list[SubNetwork] = []
    assert evaluator_of(ledger, whole, paid)(WEAK).values["accuracy"] == 10 / 64
    assert paid == [WEAK]


def test_rivals_are_no_larger(tmp_path: Path, profile: Profile) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    terms = terms_of(profile, racing=True)
    evaluator_of(ledger, terms, [])(WEAK)
    assert rivals(ledger, terms, problem_of(terms), STRONG) == []
    assert len(rivals(ledger, terms, problem_of(terms), WEAK)) == 1


@pytest.mark.parametrize(
    ("preset", "tasks", "racing", "races"),
    [
        ("quick", "arc_easy", None, True),
        ("quick", "agreement", None, False),
        ("quick", "paper", None, False),
        ("standard", "arc_easy", None, False),
        ("standard", "arc_easy", True, True),
        ("quick", "arc_easy", False, False),
    ],
)
def test_quick_runs_on_tasks_race_unless_told(
    preset: str, tasks: str, racing: bool | None, races: bool, profile: Profile
) -> None:
    from compressor.presets import effort

    asked = {"tasks": tasks} | ({} if racing is None else {"racing": racing})
    base = RunRequest(profile=profile, preset=preset, effort=effort(preset))
    assert with_flags(base, asked).races is races
