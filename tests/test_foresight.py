"""A search whose speed budgets bind, on an imagined device: what is surely too slow is not built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor import device
from compressor.engines.speed import SpeedModel
from compressor.errors import UnfitMachineError
from compressor.evaluation.score import Score
from compressor.ledger import Ledger
from compressor.measurement import Measurement
from compressor.pipeline.candidates import MEASURE, PREDICTED, Evaluator, Terms
from compressor.pipeline.context import Context
from compressor.pipeline.foresight import ENOUGH, Foresight
from compressor.pipeline.searching import make_problem, search
from compressor.profile import load_profile
from compressor.request import RunRequest, effort
from compressor.runfolder import RunFolder
from compressor.search.problem import Outcome, Problem
from compressor.space import ModelShape, SearchSpace, SubNetwork

SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49152, tie_word_embeddings=True)
SPACE = SearchSpace.from_fractions(SHAPE, (0.7, 0.8, 0.9, 1.0), (0.5, 0.75, 1.0), bits=(4, 8))
FULL_TPOT = 1.5 + 0.05 * 30 + 30 * 1536 / 8000


def tpot(subnet: SubNetwork) -> float:
    neurons = sum(w * (0.6 if b == 4 else 1.0) for w, b in zip(subnet.widths, subnet.bits, strict=True))
    return 1.5 + 0.05 * subnet.depth + neurons / 8000


class Device:
    """Measures by a formula, and remembers what it was asked to build."""

    def __init__(self) -> None:
        self.built: list[SubNetwork] = []

    def bench(self, subnet: SubNetwork) -> Measurement:
        self.built.append(subnet)
        return Measurement(ttft_ms=20 * tpot(subnet), tpot_ms=tpot(subnet), throughput_tok_s=1e3)

    def score(self, subnet: SubNetwork) -> Score:
        share = sum(subnet.widths) / (30 * 1536)
        return Score(share, 0.01, share, share, 10)


def searched(
    folder: Path, tpot_ms: float, algorithm: str = "linas", evaluations: int = 30
) -> tuple[list[Outcome], Device, Ledger]:
    profile = load_profile("starter-cpu").with_overrides(memory_gib=4.0, ttft_ms=1e6, tpot_ms=tpot_ms)
    request = RunRequest(
        profile=profile, effort=effort("quick", evaluations=evaluations), algorithm=algorithm
    )
    run = RunFolder.create_or_update(folder, request.model_dump(mode="json"))
    ledger = Ledger(run.ledger)
    context = Context(run, request, ledger, device.detect(), lambda _: None)
    terms = Terms(SHAPE, "w", "t", "bf16", "int8", "toy", "onnxruntime", profile.workload)
    imagined = Device()
    evaluator = Evaluator(ledger, terms, imagined.score, imagined.bench)
    return search(context, make_problem(profile, SPACE, terms), evaluator), imagined, ledger


class Shared(Device):
    """Half as fast in every second measurement; from the one after ``alone`` on it measures in turns."""

    def __init__(self, alone: int = 0) -> None:
        super().__init__()
        self.alone = alone

    def bench(self, subnet: SubNetwork) -> Measurement:
        measured = super().bench(subnet)
        slower = 1 + len(self.built) % 2
        beside = {
            "ttft_ratio": tpot(subnet) / FULL_TPOT,
            "tpot_ratio": tpot(subnet) / FULL_TPOT,
            "reference_ttft_ms": 20 * FULL_TPOT * slower,
            "reference_tpot_ms": FULL_TPOT * slower,
        }
        times = measured.ttft_ms * slower, measured.tpot_ms * slower
        return Measurement(*times, 1e3, conditions=beside if len(self.built) > self.alone else {})


def foresight_on(folder: Path, imagined: Device) -> tuple[Foresight, Problem]:
    profile = load_profile("starter-cpu")
    terms = Terms(SHAPE, "w", "t", "bf16", "int8", "toy", "onnxruntime", profile.workload)
    evaluator = Evaluator(Ledger(folder / "ledger.sqlite"), terms, imagined.score, imagined.bench)
    return Foresight(evaluator, 1.0, 1.0), make_problem(profile, SPACE, terms)


def assert_tells_apart(model: SpeedModel | None) -> None:
    """Right but for one factor, which nobody can know on a machine whose speed changes."""
    assert model is not None and model.error < 0.01
    estimates = [model.predict(subnet).tpot_ms / tpot(subnet) for subnet in SPACE.uniform_subnetworks()]
    assert max(estimates) < 1.01 * min(estimates) and 1 <= min(estimates) <= 2


def test_figures_taken_in_turns_are_compared_by_their_ratio(tmp_path: Path) -> None:
    foresight, problem = foresight_on(tmp_path, Shared())
    assert_tells_apart(foresight.prepare(problem))


def test_what_was_measured_before_turns_began_is_left_out_in_time(tmp_path: Path) -> None:
    foresight, problem = foresight_on(tmp_path, Shared(alone=6))
    before = foresight.prepare(problem)
    assert before is not None and before.error > 0.1
    rng = np.random.default_rng(0)
    for _ in range(ENOUGH):
        foresight.evaluator.measure(SPACE.sample(rng))
    assert_tells_apart(foresight.refitted())


@pytest.mark.parametrize("algorithm", ["linas", "random"])
def test_over_budget_candidates_are_not_built(tmp_path: Path, algorithm: str) -> None:
    limit = 0.75 * FULL_TPOT
    outcomes, imagined, ledger = searched(tmp_path, limit, algorithm)
    assert len(outcomes) == 30
    evaluated = [outcome.subnet for outcome in outcomes]
    assert all(tpot(subnet) <= 1.01 * limit for subnet in evaluated)
    only_measured = [subnet for subnet in imagined.built if subnet not in evaluated]
    assert 0 < len(only_measured) <= 8
    assert len(imagined.built) == len(set(imagined.built))
    for row in ledger.rows(task=PREDICTED):
        assert row.status == "infeasible" and row.details["predicted"]
        assert row.metrics["tpot_ms"] == pytest.approx(tpot(row.subnet), rel=0.02)


def test_a_resumed_search_goes_the_same_way(tmp_path: Path) -> None:
    limit = 0.75 * FULL_TPOT
    whole, _, _ = searched(tmp_path / "whole", limit)
    searched(tmp_path / "parts", limit, evaluations=22)
    again, imagined, ledger = searched(tmp_path / "parts", limit)
    assert [o.subnet for o in again] == [o.subnet for o in whole]
    assert len(imagined.built) == 8
    keys = [row.key for row in ledger.rows()]
    assert len(keys) == len(set(keys))


def test_budgets_that_do_not_bind_cost_no_measurement(tmp_path: Path) -> None:
    outcomes, imagined, ledger = searched(tmp_path, 10 * FULL_TPOT)
    assert {o.subnet for o in outcomes} == set(imagined.built)
    assert len(ledger.rows(task=MEASURE)) == 30 and not ledger.rows(task=PREDICTED)


def test_a_budget_that_nothing_meets_still_finds_the_nearest(tmp_path: Path) -> None:
    outcomes, _, _ = searched(tmp_path, 0.01, evaluations=8)
    assert len(outcomes) <= 8


def test_what_does_not_fit_is_infeasible_and_the_search_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    terms = Terms(SHAPE, "w", "t", "bf16", "int8", "toy", "onnxruntime", load_profile("starter-cpu").workload)

    def bench(_: SubNetwork) -> Measurement:
        raise UnfitMachineError("0.20 GiB of memory are needed and 0.10 GiB are free")

    outcome = Evaluator(ledger, terms, Device().score, bench)(SPACE.full)
    (row,) = ledger.rows()
    assert outcome.status == row.status == "infeasible"
    assert "0.20 GiB" in str(row.details["error"]) and not row.metrics
