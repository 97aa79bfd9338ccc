"""Accuracy on lm-eval tasks: requests made and tokenized once, then scored for any sub-network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compressor.errors import InputError
from compressor.evaluation.encoding import DEFAULT_MAX_LENGTH, Encoded, Encoder
from compressor.evaluation.packing import CPU_COSTS, Costs
from compressor.evaluation.racing import ALPHA, Raced, most_looks, run_race, rungs
from compressor.evaluation.score import Items, Score
from compressor.evaluation.taskdata import Split
from compressor.evaluation.tasks import LoadedTask, check_names, load_tasks
from compressor.evaluation.tasksize import SEARCH_ITEMS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.evaluation.scorer import Likelihoods, Plan
    from compressor.evaluation.shared_layers import SharedLayers

    class LikelihoodsOf(Protocol):
        """Scores requests; ``greedy``: and says which continuations are greedy."""

        def __call__(self, encoded: Sequence[Encoded], *, greedy: bool = True) -> Likelihoods: ...


RACING_OVERHEAD = 1.25
"""Most tokens that a race run to its end may cost, in those of scoring all items at once."""
RUNG_TOKENS = {"cpu": 3700, "cuda": 31000}
"""About the tokens of a rung: they nearly fill two passes (``schedule.BLOCK_BYTES``), on a CPU one for each
of two threads. A few more make four small passes, which took a sixth longer there."""


class TaskEvaluator:
    """Scores models on one or more tasks; the mean weighs every name alike (groups as lm-eval does).

    ``task_data`` is a folder of local data sets, else they come from the hub; ``num_fewshot``
    overrides each task's own; ``limit`` bounds the items of a task; ``seed`` draws few-shot examples.
    Unknown names raise ``InputError`` at once; data are read when a split is first used.
    """

    def __init__(
        self,
        names: str | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        task_data: Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        seed: int = 1234,
        max_length: int = DEFAULT_MAX_LENGTH,
    ) -> None:
        self.names = check_names(names)
        self.task_data = task_data
        self.num_fewshot = num_fewshot
        self.limit = limit
        self.seed = seed
        self._encoder = Encoder(tokenizer, max_length)
        self._prepared: dict[Split, Prepared] = {}

    def score(
        self, model: PreTrainedModel, split: Split = "search", shared: SharedLayers | None = None
    ) -> Score:
        """Accuracy of a model, or of the sub-network activated in it, on a split.

        With ``shared``, layers that an earlier sub-network began with are not computed again.
        """
        from compressor.evaluation.scorer import score_plan

        prepared = self._prepare_for(model, split)
        return prepared.score(score_plan(prepared.plan(), model, shared))

    def race(
        self,
        model: PreTrainedModel,
        rivals: Sequence[bytes],
        split: Split = "search",
        alpha: float = ALPHA,
        shared: SharedLayers | None = None,
    ) -> Raced:
        """Score a model, but stop once a rival is more accurate at the stated error rate ``alpha``.

        ``rivals`` are ``Score.items`` of sub-networks that are no worse in every other objective. With
        none, this is a full evaluation, rung by rung all the same: in bf16 an item's score depends a
        little on what is computed beside it, and those that are compared are to be computed alike.
        """
        from compressor.evaluation.scorer import score_plan

        prepared = self._prepare_for(model, split)
        looks = prepared.looks(self.seed, RUNG_TOKENS.get(model.device.type, RUNG_TOKENS["cpu"]))
        if looks == 1:
            return Raced(self.score(model, split, shared), None, prepared.num_items, prepared.num_items)
        found: list[tuple[Prepared, Likelihoods]] = []

        def evaluate(rung: int, items: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
            part = prepared.part(rung, items)
            found.append((part, score_plan(part.plan(), model, shared)))
            return part.items(found[-1][1]).values

        def finish() -> Items:
            return prepared.joined(found)

        return run_race(evaluate, finish, rivals, prepared.num_items, self.seed, alpha, looks)

    def score_artefact(self, likelihoods: LikelihoodsOf, split: Split = "report") -> Score:
        """Accuracy of the artefact itself, by what its engine makes of the requests."""
        prepared = self.prepare(split)
        return prepared.score(likelihoods(prepared.encoded, greedy=bool((prepared.golds < 0).any())))

    def key(self, split: Split = "search") -> str:
        """Name of this evaluation in the ledger: tasks, split, few-shot count, limit and seed."""
        shots = "own" if self.num_fewshot is None else str(self.num_fewshot)
        most = f"most{SEARCH_ITEMS}" if split == "search" else "all"
        limit = most if self.limit is None else str(self.limit)
        return f"{'+'.join(self.names)}:{split}:shots{shots}:limit{limit}:seed{self.seed}"

    def prepare(self, split: Split) -> Prepared:
        """The split's requests, made and tokenized the first time. Raises ``InputError``."""
        if split not in self._prepared:
            tasks = load_tasks(self.names, split, self.task_data, self.num_fewshot, self.limit, self.seed)
            self._prepared[split] = _prepare(tasks, self._encoder)
        return self._prepared[split]

    def _prepare_for(self, model: PreTrainedModel, split: Split) -> Prepared:
        """The split's requests, to be packed as suits the first model that is scored on them."""
        from compressor.evaluation.scorer import costs_of

        prepared = self.prepare(split)
        if prepared.costs is None:
            prepared.costs = costs_of(model)
        return prepared


@dataclass
class Prepared:
    """A split's requests. Item i's are ``encoded[starts[i] : starts[i + 1]]``; ``strata[i]`` its task.

    ``tasks``, ``docs`` and ``golds`` (right choice; -1 where lm-eval itself must judge) are by item.
    """

    tasks: Sequence[LoadedTask]
    docs: Sequence[Any]
    encoded: Sequence[Encoded]
    starts: NDArray[np.int64]
    strata: NDArray[np.int64]
    golds: NDArray[np.int64]
    indices: NDArray[np.int64] | None = None
    costs: Costs | None = None
    _plan: Plan | None = None
    _parts: dict[int, Prepared] = field(default_factory=dict)
    _looks: int | None = None

    @property
    def num_items(self) -> int:
        return len(self.docs)

    @property
    def truncated(self) -> int:
        """Requests that were longer than the model takes and lost tokens on the left."""
        return sum(request.truncated for request in self.encoded)

    def plan(self) -> Plan:
        from compressor.evaluation.scorer import Plan

        if self._plan is None:
            self._plan = Plan.of(self.encoded, self.costs or CPU_COSTS)
        return self._plan

    def score(self, likelihoods: Likelihoods) -> Score:
        """Accuracy over tasks, with per-item results behind it."""
        return self.items(likelihoods).score()

    def part(self, rung: int, items: NDArray[np.int64]) -> Prepared:
        """Some of the items, with a plan of their own that is made once a rung."""
        if rung not in self._parts:
            counts = np.diff(self.starts)[items]
            encoded = [e for i in items for e in self.encoded[self.starts[i] : self.starts[i + 1]]]
            self._parts[rung] = Prepared(
                self.tasks,
                [self.docs[i] for i in items],
                encoded,
                np.concatenate([[0], np.cumsum(counts)]),
                self.strata[items],
                self.golds[items],
                items,
                self.costs,
            )
        return self._parts[rung]

    def looks(self, seed: int, rung_tokens: int = RUNG_TOKENS["cpu"]) -> int:
        """Rungs of a race: fewer where items are short, and where they share long prefixes, which every rung
        computes anew."""
        if self._looks is None:
            tokens = self.plan().packing.tokens
            most = RACING_OVERHEAD * tokens
            self._looks = max(1, min(most_looks(self.num_items), round(tokens / rung_tokens)))
            while self._looks > 1 and self._tokens(seed, self._looks) > most:
                self._looks //= 2
                self._parts.clear()
        return self._looks

    def _tokens(self, seed: int, looks: int) -> int:
        """Tokens of all rungs together."""
        parts = (self.part(i, items) for i, items in enumerate(rungs(self.num_items, seed, looks)))
        return sum(part.plan().packing.tokens for part in parts)

    def joined(self, parts: Sequence[tuple[Prepared, Likelihoods]]) -> Items:
        """Results of all items from those of disjoint parts."""
        values = np.empty(len(self.encoded))
        greedy = np.empty(len(self.encoded), np.bool_)
        for part, likelihoods in parts:
            assert part.indices is not None
            where = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in part.indices])
            values[where], greedy[where] = likelihoods.values, likelihoods.greedy
        return self.items(type(parts[0][1])(values, greedy))

    def items(self, likelihoods: Likelihoods) -> Items:
        """Per-item results of all items."""
        values = np.array([self.value(i, likelihoods) for i in range(self.num_items)])
        return Items(
            values,
            tuple(task.name for task in self.tasks),
            self.strata,
            tuple(task.weight for task in self.tasks),
            loglikelihoods=likelihoods.values,
            choices=np.diff(self.starts),
        )

    def value(self, item: int, likelihoods: Likelihoods) -> float:
        """What lm-eval's metric gives an item: 1 or 0 for a right or wrong choice."""
        mine = slice(self.starts[item], self.starts[item + 1])
        if self.golds[item] >= 0:
            return float(np.argmax(likelihoods.values[mine]) == self.golds[item])
        task = self.tasks[self.strata[item]]
        pairs = zip(likelihoods.values[mine].tolist(), likelihoods.greedy[mine].tolist(), strict=True)
        return float(task.task.process_results(self.docs[item], list(pairs))[task.metric])


def _prepare(tasks: Sequence[LoadedTask], encoder: Encoder) -> Prepared:
    docs, pairs, counts, strata, golds = [], [], [], [], []
    for stratum, task in enumerate(tasks):
        wanted = set(task.rows)
        for number, doc in enumerate(task.task.eval_docs):
            if number not in wanted:
                continue
            arguments, gold = _requests(task, doc, number)
            docs.append(doc)
            pairs += arguments
            counts.append(len(arguments))
            strata.append(stratum)
            golds.append(gold)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return Prepared(tasks, docs, encoder.encode(pairs), starts, np.array(strata), np.array(golds))


def _requests(task: LoadedTask, doc: Any, number: int) -> tuple[list[tuple[str, str]], int]:
    """An item's (context, continuation) pairs as lm-eval makes them, and its right choice (or -1)."""
    definition = task.task
    try:
        context = definition.fewshot_context(doc, task.num_fewshot, gen_prefix=definition.doc_to_prefix(doc))
        made = definition.construct_requests(
            doc=doc, ctx=context, metadata=(task.name, number, 1), apply_chat_template=False
        )
    except Exception as error:
        raise InputError(f"task '{task.name}', item {number}: {error}") from error
    instances = made if isinstance(made, list) else [made]
    return [instance.args for instance in instances], _gold(task, doc, number)


def _gold(task: LoadedTask, doc: Any, number: int) -> int:
    """The right choice where plain accuracy is asked, so that scoring need not render prompts again."""
    definition = task.task
    plain = (
        definition.OUTPUT_TYPE == "multiple_choice"
        and task.metric == "acc"
        and not callable(definition.config.process_results)
        and not definition.multiple_target
        and "acc_mutual_info" not in definition._metric_fn_list
    )
    if not plain:
        return -1
    gold = definition.doc_to_text(doc) if definition.multiple_input else definition.doc_to_target(doc)
    choices = definition.doc_to_choice(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise InputError(
            f"task '{task.name}', item {number}: gold {gold!r} is none of its {len(choices)} choices"
        )
    return gold
