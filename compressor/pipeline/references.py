"""The unpruned model as a user would otherwise pick it: bf16 in PyTorch, INT8 and INT4 in the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.pytorch import bench_pytorch
from compressor.evaluation.score import Score
from compressor.ledger import Key, Row
from compressor.measurement import Measurement
from compressor.models import LoadedModel
from compressor.pipeline.accuracy import AccuracyTask
from compressor.pipeline.artefacts import OnnxArtefact
from compressor.pipeline.candidates import MEASURE
from compressor.pipeline.context import Context
from compressor.space import Numerics, SubNetwork

QUANTIZED: tuple[Numerics, ...] = ("int8", "int4")
PYTORCH = "torch"
Load = Callable[[torch.dtype], LoadedModel]


@dataclass(frozen=True)
class ReferenceSet:
    """Measures and scores the unpruned model; ``weights`` is the base model's hash."""

    context: Context
    task: AccuracyTask
    full: SubNetwork
    weights: str
    bench_seconds: float

    def speed_key(self, numerics: Numerics) -> Key:
        engine = PYTORCH if numerics == "bf16" else OnnxRuntimeEngine.name
        workload = self.context.request.profile.workload.label
        return Key(
            self.full.digest,
            self.weights,
            MEASURE,
            numerics,
            self.context.device_label,
            engine,
            workload,
        )

    def score_key(self, numerics: Numerics, split: str) -> Key:
        engine = PYTORCH if numerics == "bf16" else OnnxRuntimeEngine.name
        return Key(self.full.digest, self.weights, self.task.key(split), numerics, engine=engine)

    def pay(self, engine: OnnxRuntimeEngine, load: Load, compute: torch.dtype) -> Iterator[str]:
        """Fill the ledger with what it lacks, yielding what is done; cheap when all is there.

        ``load`` gives the unpruned model in a dtype. It is timed in bf16, as a user has it, and scored in
        ``compute``, as sub-networks are: the same weights, and far sooner on a CPU slow in bf16.
        """
        for numerics in ("bf16", *QUANTIZED):
            yield f"unpruned in {numerics}"
            if numerics == "bf16":
                self._measure_pytorch(load, compute)
            else:
                self._measure_engine(engine, numerics)

    def _measure_pytorch(self, load: Load, compute: torch.dtype) -> None:
        ledger, workload = self.context.ledger, self.context.request.profile.workload
        if self.context.cluster is None and ledger.get(self.speed_key("bf16")) is None:
            model = load(torch.bfloat16).model
            measured = bench_pytorch(model, workload, max_seconds=self.bench_seconds)
            ledger.put(
                Row(self.speed_key("bf16"), self.full, measured.metrics(), details=dict(measured.conditions))
            )
        missing = self._unscored("bf16")
        if missing:
            model = load(compute).model
            for split in missing:
                self._keep("bf16", split, self.task.score_model(model, split))

    def _unscored(self, numerics: Numerics) -> list[str]:
        ledger = self.context.ledger
        return [split for split in self.task.splits if ledger.get(self.score_key(numerics, split)) is None]

    def _measure_engine(self, engine: OnnxRuntimeEngine, numerics: Numerics) -> None:
        ledger = self.context.ledger
        if ledger.get(self.speed_key(numerics)) is None:
            speed = self._bench(engine, numerics)
            ledger.put(
                Row(self.speed_key(numerics), self.full, speed.metrics(), details=dict(speed.conditions))
            )
        missing = self._unscored(numerics)
        if missing:
            artefact = OnnxArtefact(engine, engine.build(self.full, numerics))
            for split in missing:
                self._keep(numerics, split, self.task.score_artefact(artefact, split))

    def _bench(self, engine: OnnxRuntimeEngine, numerics: Numerics) -> Measurement:
        return self.context.bench(
            engine.export.folder,
            self.full,
            self.context.request.profile.workload,
            numerics=numerics,
            threads=self.context.request.threads,
            max_seconds=self.bench_seconds,
        )

    def _keep(self, numerics: Numerics, split: str, score: Score) -> None:
        self.context.ledger.put(
            Row(self.score_key(numerics, split), self.full, score.metrics(), items=score.items)
        )
