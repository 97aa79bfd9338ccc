"""The unpruned model as a user would otherwise pick it: in bf16, and in each form that takes seconds to make
for the engine that serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from compressor.engines.pytorch import bench_pytorch
from compressor.errors import UnfitMachineError
from compressor.evaluation.score import Score
from compressor.ledger import Key, Row
from compressor.models import LoadedModel
from compressor.pipeline.accuracy import AccuracyTask
from compressor.pipeline.aside import free_gpu
from compressor.pipeline.candidates import MEASURE
from compressor.pipeline.context import Context
from compressor.pipeline.targets import Target
from compressor.space import Numerics, SubNetwork

PYTORCH = "torch"
EMBEDDINGS_IN_8 = "int4+8"
"""Layers in 4 bits, embeddings and head in 8."""
REFERENCE = "measure:reference"
Load = Callable[[], LoadedModel]


@dataclass(frozen=True)
class Form:
    """One way to have the unpruned model: in what numerics, and with what bits where those leave a choice."""

    name: str
    numerics: Numerics
    subnet: SubNetwork


@dataclass(frozen=True)
class ReferenceSet:
    """Measures and scores the unpruned model; ``weights`` is the base model's hash.

    In bf16 it is measured in PyTorch where the engine that serves has no bf16 of its own.
    """

    context: Context
    target: Target
    task: AccuracyTask
    full: SubNetwork
    weights: str
    bench_seconds: float

    @property
    def forms(self) -> tuple[Form, ...]:
        found = [Form(n, n, self.full) for n in ("bf16", *self.target.reference_numerics)]
        if "int4" in self.target.reference_numerics and not self.target.measures_bf16:
            few = replace(self.full, bits=(4,) * self.full.depth)
            found.insert(2, Form(EMBEDDINGS_IN_8, "int8", few))
        return tuple(found)

    def engine(self, numerics: Numerics) -> str:
        """What measures the unpruned model in these numerics."""
        in_pytorch = numerics == "bf16" and not self.target.measures_bf16
        return PYTORCH if in_pytorch else self.context.request.profile.engine

    def speed_key(self, form: Form) -> Key:
        workload = self.context.request.profile.workload.key
        return Key(
            form.subnet.digest,
            self.weights,
            REFERENCE if form.name == EMBEDDINGS_IN_8 else MEASURE,
            form.numerics,
            self.context.device_label,
            self.engine(form.numerics),
            workload,
        )

    def score_key(self, form: Form, split: str) -> Key:
        engine = PYTORCH if form.numerics == "bf16" else self.engine(form.numerics)
        kept = "" if engine == PYTORCH else self.context.request.profile.workload.cache_key
        return Key(
            form.subnet.digest,
            self.weights,
            self.task.key(split),
            form.numerics,
            engine=engine,
            workload=kept,
        )

    def pay(self, to_time: Load, to_score: Load) -> Iterator[str]:
        """Fill the ledger with what it lacks, yielding what is done; cheap when all is there.

        The unpruned model is timed as a user has it, in bf16 on the device, and scored where and in what
        sub-networks are: the same weights, and far sooner on a CPU slow in bf16.
        """
        for form in self.forms:
            yield f"unpruned in {form.name}"
            with self._left_out_where_it_does_not_fit(form):
                if self.context.ledger.get(self.speed_key(form)) is None:
                    self._measure(form, to_time)
            missing = [s for s in self.task.splits if self._unknown(self.score_key(form, s))]
            if missing and form.numerics == "bf16":
                self._score_here(form, missing, to_score)
                free_gpu()  # an engine may start there next
            elif missing:
                with self._left_out_where_it_does_not_fit(form):
                    self._score_artefact(form, missing)

    @contextmanager
    def _left_out_where_it_does_not_fit(self, form: Form) -> Iterator[None]:
        """On a GPU the unpruned model may be too large to be served where its sub-networks are not."""
        try:
            yield
        except UnfitMachineError as error:
            if self.context.request.profile.device.kind != "cuda":
                raise
            self.context.warn(f"the unpruned model in {form.name} is left out of the comparison: {error}")

    def _score_artefact(self, form: Form, splits: Sequence[str]) -> None:
        with self.target.unpruned_artefact(form.subnet, form.numerics) as artefact:
            for split in splits:
                self._keep(form, split, self.task.score_artefact(artefact, split))

    def _score_here(self, form: Form, splits: Sequence[str], to_score: Load) -> None:
        """Score the unpruned model in PyTorch; nothing of it stays."""
        model = to_score().model
        for split in splits:
            self._keep(form, split, self.task.score_model(model, split))

    def _measure(self, form: Form, to_time: Load) -> None:
        if self.engine(form.numerics) != PYTORCH:
            speed = self.target.bench_unpruned(form.subnet, form.numerics, self.bench_seconds)
        elif self.context.cluster is None:
            workload = self.context.request.profile.workload
            speed = bench_pytorch(to_time().model, workload, max_seconds=self.bench_seconds)
        else:
            return  # a node of the cluster has no PyTorch
        key, metrics = self.speed_key(form), speed.metrics()
        self.context.ledger.put(Row(key, form.subnet, metrics, details=dict(speed.conditions)))

    def _unknown(self, key: Key) -> bool:
        return self.context.ledger.get(key) is None

    def _keep(self, form: Form, split: str, score: Score) -> None:
        self.context.ledger.put(
            Row(self.score_key(form, split), form.subnet, score.metrics(), items=score.items)
        )
