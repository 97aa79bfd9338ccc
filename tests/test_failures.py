"""Evaluations that fail on an imagined device: what is tried again, left out, or stops the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor import device
from compressor.engines.host import require_free_gpu
from compressor.errors import (
    DeviceFaultError,
    InputError,
    MemoryExhaustedError,
    StoppedError,
    UnfitMachineError,
    WorkerDiedError,
)
from compressor.evaluation.score import Score
from compressor.ledger import Ledger, Row
from compressor.measurement import Measurement
from compressor.pipeline.aside import Aside
from compressor.pipeline.candidates import Evaluator, Terms, known_outcomes
from compressor.pipeline.context import Context
from compressor.pipeline.failures import CIRCUMSTANCE, kind_of
from compressor.pipeline.searching import make_problem, search
from compressor.profile import load_profile
from compressor.request import RunRequest, effort
from compressor.runfolder import RunFolder
from compressor.search.problem import Outcome
from compressor.space import ModelShape, SearchSpace, SubNetwork

SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49152, tie_word_embeddings=True)
SPACE = SearchSpace.from_fractions(SHAPE, (0.7, 0.8, 0.9, 1.0), (0.5, 0.75, 1.0))
CUDA_ERROR = RuntimeError("CUDA error: an illegal memory access was encountered\nfor debugging ...")


class Lab:
    """An imagined device that fails as told, and everything that is done on it in order."""

    def __init__(self, folder: Path, fail: Callable[[int], Exception | None] = lambda _: None) -> None:
        self.fail, self.log, self.measured = fail, [], 0  # type: ignore[var-annotated]
        self.request = RunRequest(
            profile=load_profile("starter-cpu").with_overrides(memory_gib=4.0, ttft_ms=1e6, tpot_ms=1e6),
            effort=effort("quick", evaluations=24),
            algorithm="random",
        )
        self.run = RunFolder.create_or_update(folder, self.request.model_dump(mode="json"))
        self.ledger = Ledger(self.run.ledger)
        workload = self.request.profile.workload
        self.terms = Terms(SHAPE, "w", "t", "bf16", "int8", "toy", "onnxruntime", workload)

    @property
    def evaluator(self) -> Evaluator:
        return Evaluator(
            self.ledger, self.terms, self.score, self.bench, make_room=lambda: self.log.append("room")
        )

    def bench(self, _subnet: SubNetwork) -> Measurement:
        self.log.append("measure")
        self.measured += 1
        error = self.fail(self.measured)
        if error is not None:
            raise error
        return Measurement(ttft_ms=1.0, tpot_ms=1.0, throughput_tok_s=1e3)

    def score(self, subnet: SubNetwork) -> Score:
        self.log.append("score")
        share = sum(subnet.widths) / (30 * 1536)
        return Score(share, 0.01, share, share, 10)

    def one(self) -> tuple[Outcome, Row]:
        outcome = self.evaluator(SPACE.smallest)
        (row,) = self.ledger.rows(task="measure")
        return outcome, row

    def search(self, together: int = 1) -> list[Outcome]:
        context = Context(self.run, self.request, self.ledger, device.detect(), lambda _: None)
        problem = make_problem(self.request.profile, SPACE, self.terms)
        return search(context, problem, self.evaluator, together)


def on(*numbers: int, error: Exception) -> Callable[[int], Exception | None]:
    """Fails at these measurements."""
    return lambda number: error if number in numbers else None


@pytest.mark.parametrize(
    "error", [MemoryError(), MemoryExhaustedError("33.1 GiB are needed"), torch.OutOfMemoryError("CUDA out")]
)
def test_what_memory_spoiled_is_tried_once_more_alone(tmp_path: Path, error: Exception) -> None:
    lab = Lab(tmp_path, on(1, error=error))
    outcome, row = lab.one()
    assert lab.log == ["measure", "room", "measure", "score"]
    assert outcome.status == row.status == "ok"


def test_what_does_not_fit_alone_either_is_infeasible_with_the_figure(tmp_path: Path) -> None:
    outcome, row = Lab(tmp_path, on(1, 2, error=MemoryExhaustedError("33.1 GiB are needed"))).one()
    assert outcome.status == "infeasible" and "33.1 GiB are needed" in str(row.details["error"])
    assert CIRCUMSTANCE not in row.details


def test_a_worker_that_died_is_replaced_and_asked_once_more(tmp_path: Path) -> None:
    lab = Lab(tmp_path, on(1, error=WorkerDiedError("it was killed")))
    outcome, _ = lab.one()
    assert outcome.status == "ok" and lab.log.count("measure") == 2


def test_what_failed_by_circumstance_is_asked_for_again_on_resume(tmp_path: Path) -> None:
    lab = Lab(tmp_path, on(1, 2, error=WorkerDiedError("it was killed")))
    outcome, row = lab.one()
    assert outcome.status == "failed" and row.details[CIRCUMSTANCE]
    assert lab.ledger.forget_failed(CIRCUMSTANCE) == 1
    assert lab.one()[0].status == "ok"
    assert lab.ledger.forget_failed(CIRCUMSTANCE) == 0


def test_what_the_machine_lacks_is_not_tried_again(tmp_path: Path) -> None:
    lab = Lab(tmp_path, on(1, error=UnfitMachineError("no kernel")))
    assert lab.one()[0].status == "infeasible" and lab.log == ["measure"]


def test_a_lost_gpu_stops_the_run_and_the_ledger_goes_on(tmp_path: Path) -> None:
    lab = Lab(tmp_path, on(10, error=CUDA_ERROR))
    with pytest.raises(DeviceFaultError, match=r"illegal memory access.*--resume"):
        lab.search()
    kept = known_outcomes(lab.ledger, lab.terms)
    assert kept and all(outcome.status == "ok" for outcome in kept)
    assert all(row.status == "ok" for row in lab.ledger.rows())
    again = Lab(tmp_path)
    assert len(again.search()) == 24 and again.measured == 24 - len(kept)


def test_three_failures_in_a_row_stop_and_say_why(tmp_path: Path) -> None:
    lab = Lab(tmp_path, lambda number: InputError("the folder is gone") if number > 5 else None)
    with pytest.raises(StoppedError, match=r"3 sub-networks in a row .* the folder is gone"):
        lab.search()
    assert lab.measured == 5 + 3


def test_single_failures_do_not_stop_a_search(tmp_path: Path) -> None:
    lab = Lab(tmp_path, lambda number: InputError("odd") if number % 3 == 0 else None)
    assert [outcome.status for outcome in lab.search()].count("failed") > 3


def test_owners_alternate_in_rounds(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    outcomes = lab.search(together=8)
    assert len(outcomes) == 24
    changes = sum(one != other for one, other in zip(lab.log, lab.log[1:], strict=False))
    assert changes + 1 <= 2 * 5, "a round is measured, then scored"
    alone = Lab(tmp_path / "alone")
    assert [o.subnet for o in alone.search()] == [o.subnet for o in outcomes]
    assert alone.log.count("score") == 24 == lab.log.count("score")


def test_kinds_of_errors() -> None:
    assert kind_of(RuntimeError("CUDA error: device-side assert triggered")) == "poisoned"
    assert kind_of(torch.OutOfMemoryError("CUDA out of memory")) == "memory"
    assert kind_of(RuntimeError("shapes differ")) == "failed"


def test_an_engine_starts_only_where_its_memory_is_free() -> None:
    require_free_gpu(100, lambda: 100)
    require_free_gpu(100, lambda: -1)
    with pytest.raises(MemoryExhaustedError, match=r"of the GPU's memory are needed and 0\.00 GiB are free"):
        require_free_gpu(2**30, lambda: 10)


def test_a_model_that_leaves_and_comes_back_computes_the_same(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from compressor.supernet.elastic import Elastic

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    elastic, ids = Elastic(model), torch.arange(12)[None]
    subnet = SubNetwork((0, 2), (64, 128))
    with torch.inference_mode(), elastic.activated(subnet):
        before = model(ids).logits.clone()
    aside = Aside(model)
    for _ in range(2):
        aside.leave()
        assert aside.gone
        aside.back()
    with torch.inference_mode(), elastic.activated(subnet):
        assert torch.equal(model(ids).logits, before)
