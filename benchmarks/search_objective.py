"""A real objective for comparing searches: agreement of the starter's sub-networks, each paid for once.

The super-network is the starter with layers and neurons ranked, not tuned; or that of a finished run.
Every evaluation lies in one ledger, so that algorithms and seeds share what they have in common.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from compressor import models
from compressor.compute import fastest_cpu_dtype
from compressor.engines.rounding import RoundedWeights
from compressor.evaluation.agreement import AgreementText, torch_predict
from compressor.evaluation.shared_layers import SharedLayers
from compressor.ledger import Key, Ledger, Row
from compressor.search.problem import ExactConstraint, Objective, Outcome, Problem
from compressor.space import SearchSpace, SubNetwork, weight_bytes
from compressor.supernet.elastic import Elastic
from compressor.supernet.folder import SupernetInfo, load_supernet, read_info, save_supernet
from compressor.supernet.importance import rank, sort_neurons
from compressor.supernet.sampling import sample_text

LEDGER = "bench.sqlite"
CALIBRATION_SEQUENCES = 16
KEPT_BYTES = 8 << 30
DEPTHS, WIDTHS = (0.75, 0.875, 1.0), (0.5, 1.0)


def prepare(folder: Path, model: str, sequences: int, length: int) -> None:
    """Write ``supernet/`` and ``text.npz`` to the folder, unless a run or an earlier call did."""
    supernet, text = folder / "supernet", folder / "text.npz"
    if text.is_file() and (supernet / "supernet.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    loaded = models.load(models.resolve(model), fastest_cpu_dtype())
    ids = sample_text(loaded.model, loaded.tokenizer, CALIBRATION_SEQUENCES + 2 * sequences, length).ids
    AgreementText.build(ids[CALIBRATION_SEQUENCES:], torch_predict(loaded.model)).save(text)
    importance = rank(loaded.model, [ids[:CALIBRATION_SEQUENCES]])
    sort_neurons(loaded.model, importance)
    save_supernet(loaded.model, loaded.tokenizer, importance.drop_order, importance.ordering, supernet)


@dataclass(frozen=True)
class Bench:
    """The question that all algorithms are asked, and how it is answered."""

    problem: Problem
    elastic: Elastic
    text: AgreementText
    info: SupernetInfo
    ledger: Ledger
    budget_bytes: float
    numerics: str
    shared: SharedLayers

    def evaluate(self, subnet: SubNetwork) -> tuple[Outcome, float]:
        """The outcome, and the seconds that it costs when it is not in the ledger already."""
        key = Key(subnet.digest, self.info.weights_hash, self.text.task_key("search"), self.numerics)
        row = self.ledger.get(key)
        if row is None:
            began = time.perf_counter()
            with self.elastic.activated(subnet) as model:
                score = self.text.score(torch_predict(model, self.shared), "search")
            cost = time.perf_counter() - began
            row = self.ledger.put(Row(key, subnet, score.metrics(), items=score.items, cost_s=cost))
        size = self.problem.exact["weight_bytes"](subnet)
        return Outcome(subnet, {**row.metrics, "weight_bytes": size}), row.cost_s


def open_bench(folder: Path, budget_share: float, bits: tuple[int, ...] = ()) -> Bench:
    """The bench on ``folder``'s super-network: agreement against INT8 bytes, within a share of the
    unpruned model's. With ``bits``, layers may have any of these, and are scored as rounded to them."""
    dtype = fastest_cpu_dtype()
    model, _, _ = load_supernet(folder / "supernet", dtype)
    elastic = Elastic(model, RoundedWeights(model, bits, (8,)).choose) if bits else Elastic(model)
    info = read_info(folder / "supernet")
    space = SearchSpace.from_fractions(elastic.shape, DEPTHS, WIDTHS, info.drop_order, bits or (8,))

    @cache
    def size(subnet: SubNetwork) -> float:
        return float(weight_bytes(space.shape, subnet, "int8"))

    budget = budget_share * size(SubNetwork(space.full.layers, space.full.widths))
    problem = Problem(
        space,
        (Objective("accuracy", maximize=True), Objective("weight_bytes")),
        {"weight_bytes": size},
        (ExactConstraint("memory", size, budget, "MiB", 2**20),),
    )
    text = AgreementText.load(folder / "text.npz")
    numerics = "int8" if bits else str(dtype)
    shared = SharedLayers(model, lambda: elastic.active, KEPT_BYTES)
    return Bench(problem, elastic, text, info, Ledger(folder / LEDGER), budget, numerics, shared)
