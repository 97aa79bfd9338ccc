"""fp32 log-likelihoods and accuracies of the unpruned starter, by lm-eval's own model and by ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from evaluation_units import Bench, Requests, items_of, timed

from compressor.evaluation.evaluator import TaskEvaluator
from compressor.evaluation.score import Items
from compressor.evaluation.scorer import PackedLM
from compressor.evaluation.tasks import load_tasks

Who = Literal["hflm", "ours"]
SCORERS: tuple[Who, ...] = ("hflm", "ours")
SUBJECTS = (
    *("abstract_algebra", "anatomy", "astronomy", "business_ethics", "college_biology"),
    *("computer_security", "econometrics", "global_facts", "human_aging", "management"),
    *("marketing", "virology"),
)
LIMITS = {"arc_challenge": 300, "arc_easy": 300, "mmlu": 15, "truthfulqa_mc1": 60, "winogrande": 500}
"""Items of each task's report split that accuracy is compared on; of mmlu, of each subject."""
HFLM_BATCH = 8


def loglikelihoods(bench: Bench, who: Who, task: str) -> dict[str, Any]:
    """Of every choice of the timed requests, nats, and the time that it took."""
    requests = bench.requests(task)
    model = bench.model("fp32")
    lm = bench.hflm_of("fp32", HFLM_BATCH) if who == "hflm" else PackedLM(model, bench.tokenizer)
    results: list[tuple[float, bool]] = []
    times = timed(lambda: results.extend(lm.loglikelihood(requests, disable_tqdm=True)))
    return times | {"values": [value for value, _ in results]}


def compare(bench: Bench, task: str, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of two scorers' log-likelihoods, and items whose chosen answer differs.

    A task whose choices are contexts (winogrande) chooses like any other: by the larger log-likelihood.
    """
    a, b = np.array(ours["values"]), np.array(theirs["values"])
    items = items_of(bench.requests(task))
    other = sum(int(np.argmax(a[mine]) != np.argmax(b[mine])) for mine in items)
    return {"max_difference": float(np.abs(a - b).max()), "other_answers": other, "items": len(items)}


def accuracy(bench: Bench, who: Who, name: str) -> dict[str, Any]:
    """Each item right (1) or wrong (0): lm-eval's model by lm-eval's metric, ours as a run scores."""
    names = [f"mmlu_{subject}" for subject in SUBJECTS] if name == "mmlu" else [name]
    shots = 5 if name == "mmlu" else None
    if who == "ours":
        evaluator = TaskEvaluator(names, bench.tokenizer, bench.data, shots, LIMITS[name], max_length=8192)
        score = evaluator.score(bench.model("fp32"), "report")
        figures = {"value": score.value, "low": score.low, "high": score.high}
        return figures | {"right": Items.unpack(score.items).values.astype(int).tolist()}
    right: list[int] = []
    lm = bench.hflm_of("fp32", HFLM_BATCH)
    for loaded in load_tasks(names, "report", bench.data, shots, LIMITS[name]):
        loaded.task.build_all_requests(limit=LIMITS[name])
        right += _judged(loaded.task, lm.loglikelihood(loaded.task.instances, disable_tqdm=True))
    return {"value": float(np.mean(right)), "right": right}


def _judged(task: Any, results: Sequence[tuple[float, bool]]) -> list[int]:
    requests: Requests = task.instances
    return [
        int(task.process_results(requests[mine.start].doc, results[mine])["acc"])
        for mine in items_of(requests)
    ]
