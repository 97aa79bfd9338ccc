"""Report data of the starter model's shape, as a run of any length would fill it in."""

from __future__ import annotations

import math

import numpy as np

from compressor.report.data import (
    Budget,
    Candidate,
    PairedTest,
    Reference,
    ReportData,
    Score,
    SideBySide,
    Speed,
    Winner,
    Workload,
)
from compressor.space import ModelShape, SearchSpace, SubNetwork, weight_bytes

SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49152, tie_word_embeddings=True)
SPACE = SearchSpace(
    SHAPE,
    depths=(21, 23, 24, 25, 26, 27, 28, 30),
    widths=(768, 1152, 1536),
    drop_order=(*range(25, 3, -1), 26, 27, 3, 2, 28, 1, 29, 0),
)
BUDGET_BYTES = 121_000_000


def make_report_data(count: int = 120, seed: int = 0, with_winner: bool = True) -> ReportData:
    """A run that evaluated ``count`` sub-networks; some are over budget and one in fifteen failed."""
    rng = np.random.default_rng(seed)
    candidates = [_candidate(SPACE.sample(rng), i, rng) for i in range(count)]
    candidates = _mark_front(candidates)
    front = [c for c in candidates if c.on_front]
    best = max(front, key=lambda c: c.accuracy.value if c.accuracy else 0.0, default=None)
    return ReportData(
        model="SmolLM2-135M-Instruct",
        profile="starter-cpu",
        device="AMD EPYC, 2 cores",
        engine="onnxruntime",
        numerics="int8",
        task="agreement",
        workload=Workload(128, 64),
        num_layers=SHAPE.num_layers,
        intermediate_size=SHAPE.intermediate_size,
        candidates=tuple(candidates),
        references=REFERENCES,
        winner=_winner(best) if with_winner and best else None,
        budgets=_budgets(best),
        weight_budget_bytes=BUDGET_BYTES,
        loss_curves={name: _curve(rng, start) for name, start in (("super", 2.2), ("sub", 4.6))},
        conditions={
            "torch": "2.13.0+cpu",
            "onnxruntime": "1.32.0",
            "threads": "2",
            "load while measuring": "4% of the CPU",
            "seed": "0",
        },
        next_commands=(
            ("Serve it", "compress serve runs/starter-starter-cpu/package"),
            ("Ask it something", 'compress ask runs/starter-starter-cpu/package "What is a prime number?"'),
        ),
    )


REFERENCES = (
    Reference(
        "unpruned, bf16 (PyTorch)", "bf16", 269_030_016, Score(1.0), Score(1.0), Speed(310.0, 31.0, 28.2)
    ),
    Reference(
        "unpruned, INT8",
        "int8",
        151_430_400,
        Score(0.962, 0.953, 0.970, 1900),
        Score(0.958, 0.95, 0.966, 1900),
        Speed(262.0, 12.4, 61.5),
    ),
    Reference(
        "unpruned, INT4",
        "int4",
        84_190_464,
        Score(0.734, 0.714, 0.753, 1900),
        Score(0.741, 0.72, 0.76, 1900),
        Speed(288.0, 9.3, 73.2),
    ),
)


def _candidate(subnet: SubNetwork, index: int, rng: np.random.Generator) -> Candidate:
    size = weight_bytes(SHAPE, subnet, "int8")
    if index % 15 == 7:
        return Candidate(subnet, size, status="failed")
    lost = 1 - (size - 80e6) / 75e6
    share = float(np.clip(0.86 - 0.55 * lost + rng.normal(0, 0.03), 0.05, 0.95))
    half = 1.96 * math.sqrt(share * (1 - share) / 1900)
    tpot = 12.4 * size / 151e6 + float(rng.normal(0, 0.2))
    ttft = 262 * (subnet.depth / 30) * (0.45 + 0.55 * sum(subnet.widths) / subnet.depth / 1536)
    speed = Speed(ttft + float(rng.normal(0, 4)), tpot, 64_000 / (ttft + 63 * tpot))
    status = "infeasible" if size > BUDGET_BYTES else "ok"
    return Candidate(subnet, size, Score(share, share - half, share + half, 1900), speed, status)


def _mark_front(candidates: list[Candidate]) -> list[Candidate]:
    def beaten(one: Candidate) -> bool:
        return any(
            other.accuracy is not None
            and one.accuracy is not None
            and other.status == "ok"
            and other.accuracy.value > one.accuracy.value
            and other.weight_bytes <= one.weight_bytes
            for other in candidates
        )

    return [
        Candidate(c.subnet, c.weight_bytes, c.accuracy, c.speed, c.status, c.status == "ok" and not beaten(c))
        for c in candidates
    ]


def _winner(best: Candidate) -> Winner:
    assert best.accuracy is not None and best.speed is not None
    share = best.accuracy.value - 0.02
    return Winner(
        subnet=best.subnet,
        weight_bytes=best.weight_bytes,
        accuracy=Score(share, share - 0.022, share + 0.022, 1900),
        speed=best.speed,
        search_accuracy=best.accuracy,
        parameters=101_234_567,
        tests=(PairedTest("the unpruned model in INT8", 0.0001, 21, 640),),
        ttft_beside=SideBySide(0.784, 0.021),
        tpot_beside=SideBySide(0.812, 0.013),
    )


def _budgets(best: Candidate | None) -> tuple[Budget, ...]:
    if best is None or best.speed is None:
        return (Budget("memory_gib", 0.125), Budget("ttft_ms", 1500), Budget("tpot_ms", 10.5))
    return (
        Budget("memory_gib", 0.125, (best.weight_bytes + 11e6) / 2**30, True),
        Budget("ttft_ms", 1500, best.speed.ttft_ms, True),
        Budget("tpot_ms", 10.5, best.speed.tpot_ms, best.speed.tpot_ms <= 10.5),
    )


def _curve(rng: np.random.Generator, start: float) -> tuple[tuple[int, float], ...]:
    return tuple(
        (step, 1.6 + (start - 1.6) * math.exp(-step / 60) + abs(float(rng.normal(0, 0.12))))
        for step in range(0, 400, 2)
    )
