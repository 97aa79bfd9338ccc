"""Racing against scoring in full: the sub-networks of a real search on the starter, item by item."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from evaluation_units import Bench

from compressor.evaluation.evaluator import TaskEvaluator
from compressor.evaluation.racing import Raced
from compressor.evaluation.score import Items, Score
from compressor.models import shape_of_config
from compressor.search.algorithms import make_search
from compressor.search.problem import Objective, Outcome, Problem
from compressor.space import SearchSpace, parameter_count
from compressor.supernet.elastic import Elastic
from compressor.supernet.importance import rank, sort_neurons

TASK = "arc_easy"
ITEMS = 480
EVALUATIONS = 24
DEPTHS, WIDTHS = (0.8, 0.9, 1.0), (0.5, 0.75, 1.0)


def race(bench: Bench) -> dict[str, Any]:
    """LINAS over the ranked starter with full evaluations, and a race of each sub-network beside them.

    Rivals are those on the front so far that are no larger, as in a run. Full evaluations are races without
    rivals, which compute each item as a race does: the front is then another only if racing made it so.
    How many items change sides when all are computed at once, as without racing, is told beside it.
    """
    model = bench.model(bench.own_dtype)
    space = _ranked_space(bench, model)
    evaluator = TaskEvaluator(TASK, bench.tokenizer, bench.data, limit=ITEMS, max_length=8192)
    elastic = Elastic(model)
    problem = Problem(
        space,
        (Objective("accuracy", maximize=True), Objective("parameters")),
        exact={"parameters": lambda subnet: float(parameter_count(space.shape, subnet))},
    )
    algorithm = make_search("linas", problem, 0)
    sizes: list[int] = []
    full: list[float] = []
    raced: list[Raced] = []
    seconds_full = seconds_raced = 0.0
    sides = 0
    while len(full) < EVALUATIONS and (asked := algorithm.ask(1)):
        sizes.append(parameter_count(space.shape, asked[0]))
        with elastic.activated(asked[0]):
            rung_by_rung = evaluator.race(model, [], "search").score
            began = time.perf_counter()
            at_once = evaluator.score(model, "search")
            scored = time.perf_counter()
            raced.append(evaluator.race(model, _rivals(sizes, raced), "search"))
            seconds_raced += time.perf_counter() - scored
            seconds_full += scored - began
        full.append(rung_by_rung.value)
        sides += _changed_sides(rung_by_rung, at_once)
        algorithm.tell([Outcome(asked[0], {"accuracy": full[-1]})])
    fronts = [_front(sizes, values) for values in (full, [race.score.value for race in raced])]
    total = sum(race.total for race in raced)
    return {
        "task": f"{TASK}, search split, {ITEMS} items",
        "sub_networks": len(full),
        "stopped": sum(race.dominated_by is not None for race in raced),
        "items_full": total,
        "items_raced": sum(race.evaluated for race in raced),
        "saved": 1 - sum(race.evaluated for race in raced) / total,
        "items_changed_by_rounding": sides,
        "seconds_full": seconds_full,
        "seconds_raced": seconds_raced,
        "front": fronts[0],
        "same_front": fronts[0] == fronts[1],
    }


def _changed_sides(one: Score, other: Score) -> int:
    """Items that are right in one and wrong in the other."""
    return int((Items.unpack(one.items).values != Items.unpack(other.items).values).sum())


def _rivals(sizes: Sequence[int], raced: Sequence[Raced]) -> list[bytes]:
    """Results of those on the raced front so far that are no larger than the latest."""
    whole = [i for i, race in enumerate(raced) if race.dominated_by is None]
    best = _front([sizes[i] for i in whole], [raced[i].score.value for i in whole])
    return [raced[whole[i]].score.items for i in best if sizes[whole[i]] <= sizes[-1]]


def _ranked_space(bench: Bench, model: Any) -> SearchSpace:
    """Neurons sorted and layers ranked on WikiText, as a run does on text of the model's own."""
    text = (bench.data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:40000]
    ids: torch.Tensor = bench.tokenizer(text, return_tensors="pt")["input_ids"][0, :8192].view(16, 512)
    importance = rank(model, list(ids.split(4)))
    sort_neurons(model, importance)
    return SearchSpace.from_fractions(shape_of_config(model.config), DEPTHS, WIDTHS, importance.drop_order)


def _front(sizes: Sequence[int], accuracies: Sequence[float]) -> list[int]:
    """Numbers of the sub-networks that none dominates."""
    points = np.column_stack([sizes, -np.asarray(accuracies)]) if len(sizes) else np.zeros((0, 2))
    return [
        i
        for i, point in enumerate(points)
        if not any((other <= point).all() and (other < point).any() for other in points)
    ]
