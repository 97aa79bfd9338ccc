"""What accuracy means in a run: agreement with the unpruned model, or lm-eval tasks, behind one face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.evaluation.agreement import AgreementText, torch_predict
from compressor.evaluation.evaluator import TaskEvaluator
from compressor.evaluation.racing import Raced
from compressor.evaluation.score import Items, Score, mcnemar, sign_test
from compressor.evaluation.shared_layers import SharedLayers
from compressor.evaluation.tasks import check_names
from compressor.pipeline.artefacts import Artefact
from compressor.request import RunRequest


@dataclass(frozen=True)
class Paired:
    """``gained`` items only ours does better on, ``lost`` only theirs; the test's two-sided p-value."""

    p_value: float
    gained: int
    lost: int


class AccuracyTask(Protocol):
    """Scores models in PyTorch and artefacts in their engine, on the search or the report split."""

    name: str
    splits: tuple[str, ...]

    def key(self, split: str) -> str:
        """Name in the ledger."""
        ...

    def score_model(self, model: PreTrainedModel, split: str, shared: SharedLayers | None = None) -> Score:
        """Score a model; with ``shared``, without computing again what sub-networks begin with."""
        ...

    def race_model(
        self, model: PreTrainedModel, rivals: Sequence[bytes], split: str, shared: SharedLayers | None = None
    ) -> Raced:
        """Score a model, but stop once a rival (its ``Score.items``) is surely more accurate."""
        ...

    def score_artefact(self, artefact: Artefact, split: str) -> Score: ...

    def paired(self, ours: bytes, theirs: bytes) -> Paired:
        """A paired test that both are equally accurate, on the same items."""
        ...


class Agreement:
    """Agreement with the unpruned model on text that it wrote."""

    name = "agreement"
    splits: tuple[str, ...] = ("search", "report")

    def __init__(self, text: AgreementText) -> None:
        self.text = text

    def key(self, split: str) -> str:
        return self.text.task_key(split)  # type: ignore[arg-type]

    def score_model(self, model: PreTrainedModel, split: str, shared: SharedLayers | None = None) -> Score:
        return self.text.score(torch_predict(model, shared), split)  # type: ignore[arg-type]

    def race_model(
        self, model: PreTrainedModel, rivals: Sequence[bytes], split: str, shared: SharedLayers | None = None
    ) -> Raced:
        return self.text.race(torch_predict(model, shared), rivals, split)  # type: ignore[arg-type]

    def score_artefact(self, artefact: Artefact, split: str) -> Score:
        return self.text.score(artefact.top1, split)  # type: ignore[arg-type]

    def paired(self, ours: bytes, theirs: bytes) -> Paired:
        return Paired(sign_test(ours, theirs), *_won_and_lost(ours, theirs))


class Tasks:
    """Accuracy on lm-eval tasks."""

    splits: tuple[str, ...] = ("search", "report")

    def __init__(self, evaluator: TaskEvaluator) -> None:
        self.evaluator = evaluator
        self.name = "+".join(evaluator.names)

    def key(self, split: str) -> str:
        return self.evaluator.key(split)  # type: ignore[arg-type]

    def score_model(self, model: PreTrainedModel, split: str, shared: SharedLayers | None = None) -> Score:
        return self.evaluator.score(model, split, shared)  # type: ignore[arg-type]

    def race_model(
        self, model: PreTrainedModel, rivals: Sequence[bytes], split: str, shared: SharedLayers | None = None
    ) -> Raced:
        return self.evaluator.race(model, rivals, split, shared=shared)  # type: ignore[arg-type]

    def score_artefact(self, artefact: Artefact, split: str) -> Score:
        return self.evaluator.score_artefact(artefact.likelihoods, split)  # type: ignore[arg-type]

    def paired(self, ours: bytes, theirs: bytes) -> Paired:
        return Paired(mcnemar(ours, theirs), *_won_and_lost(ours, theirs))


def check_tasks(request: RunRequest) -> None:
    """Raise ``InputError`` for a task that lm-eval does not know; loads no data."""
    if not request.scores_agreement:
        check_names(request.tasks)


def make_accuracy_task(
    request: RunRequest, text: AgreementText, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> AccuracyTask:
    """What the request calls accuracy."""
    if request.scores_agreement:
        return Agreement(text)
    return Tasks(
        TaskEvaluator(
            request.tasks,
            tokenizer,
            Path(request.task_data) if request.task_data else None,
            request.num_fewshot,
            request.limit,
            max_length=max_length,
        )
    )


def _won_and_lost(ours: bytes, theirs: bytes) -> tuple[int, int]:
    difference = Items.unpack(ours).values - Items.unpack(theirs).values
    return int((difference > 0).sum()), int((difference < 0).sum())


def mixed_rows(count: int) -> NDArray[np.intp]:
    """An order of ``count`` sequences that gives both splits as many chats as plain texts.

    Sampled text alternates between the two kinds and splits take even and odd rows, so rows are put
    in an order of two plain ones, two chats.
    """
    rows = np.arange(count)
    whole = rows[: count - count % 4].reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1)
    return np.concatenate([whole, rows[count - count % 4 :]])
