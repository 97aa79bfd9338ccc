"""The unpruned model as a reference: gone before an engine starts, left out where it does not fit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import device, models
from compressor.errors import UnfitMachineError
from compressor.evaluation.agreement import AgreementText, torch_predict
from compressor.events import Event, Message
from compressor.ledger import Ledger
from compressor.measurement import Measurement
from compressor.models import LoadedModel
from compressor.pipeline.accuracy import Agreement
from compressor.pipeline.artefacts import Artefact
from compressor.pipeline.context import Context
from compressor.pipeline.references import ReferenceSet
from compressor.profile import load_profile
from compressor.request import RunRequest, effort
from compressor.runfolder import RunFolder
from compressor.space import Numerics, SubNetwork

FULL = SubNetwork((0, 1, 2, 3), (128,) * 4)


class Engine:
    """An imagined engine on a GPU: what it starts with, and what is too large for it."""

    reference_numerics: tuple[Numerics, ...] = ("int8", "int4")
    measures_bf16 = True

    def __init__(self, model: Any, too_large: tuple[str, ...] = ()) -> None:
        self.model, self.too_large, self.alive = model, too_large, {}  # type: ignore[var-annotated]

    def bench_unpruned(self, _subnet: SubNetwork, numerics: Numerics, _seconds: float) -> Measurement:
        gc.collect()
        self.alive[numerics] = self.model[-1]() is not None if self.model else False
        if numerics in self.too_large:
            raise UnfitMachineError("41.2 GiB are needed")
        return Measurement(ttft_ms=1.0, tpot_ms=1.0, throughput_tok_s=1e3)

    @contextmanager
    def unpruned_artefact(self, _subnet: SubNetwork, numerics: Numerics) -> Iterator[Artefact]:
        if numerics in self.too_large:
            raise UnfitMachineError("41.2 GiB are needed")
        yield Echo()  # type: ignore[misc]


class Echo:
    """Predicts that every token repeats."""

    def top1(self, ids: Any) -> Any:
        return ids


@pytest.fixture
def told() -> list[Event]:
    return []


def paid(
    folder: Path, model_folder: Path, told: list[Event], too_large: tuple[str, ...] = ()
) -> tuple[Engine, ReferenceSet]:
    request = RunRequest(profile=load_profile("a100-40g"), effort=effort("quick"))
    run = RunFolder.create_or_update(folder / "run", request.model_dump(mode="json"))
    context = Context(run, request, Ledger(run.ledger), device.detect(), told.append)
    loaded = models.load(models.resolve(str(model_folder)), torch.float32)
    ids = torch.randint(3, 500, (8, 12), generator=torch.Generator().manual_seed(0))
    task = Agreement(AgreementText.build(ids, torch_predict(loaded.model)))
    seen: list[Any] = []

    def load() -> LoadedModel:
        found = models.load(models.resolve(str(model_folder)), torch.float32)
        seen.append(weakref.ref(found.model))
        return found

    engine = Engine(seen, too_large)
    references = ReferenceSet(context, engine, task, FULL, "weights", 1.0)  # type: ignore[arg-type]
    assert list(references.pay(load, load)) == [f"unpruned in {n}" for n in ("bf16", "int8", "int4")]
    assert len(seen) == 1
    return engine, references


def test_its_copy_in_pytorch_is_gone_before_the_next_engine_starts(
    tmp_path: Path, tiny_model_folder: Path, told: list[Event]
) -> None:
    engine, references = paid(tmp_path, tiny_model_folder, told)
    assert engine.alive == {"bf16": False, "int8": False, "int4": False}
    ledger = references.context.ledger
    assert all(ledger.get(references.score_key(form, "report")) for form in references.forms)


def test_numerics_that_do_not_fit_the_gpu_are_left_out(
    tmp_path: Path, tiny_model_folder: Path, told: list[Event]
) -> None:
    _, references = paid(tmp_path, tiny_model_folder, told, ("bf16", "int8"))
    ledger = references.context.ledger
    bf16, _, int4 = references.forms
    assert ledger.get(references.speed_key(bf16)) is None
    assert ledger.get(references.score_key(bf16, "report")) is not None, "scored in PyTorch all the same"
    assert ledger.get(references.speed_key(int4)) is not None
    texts = [event.text for event in told if isinstance(event, Message)]
    assert sum("left out of the comparison: 41.2 GiB" in text for text in texts) == 3
