"""Agreement: how often a sub-network's next token is the unpruned model's, on the latter's own text.

It needs no data set. The text is sampled from the unpruned model once; its top choices are kept
beside it, so that scoring a sub-network needs no second model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from compressor.errors import InputError
from compressor.evaluation.racing import Raced, run_race
from compressor.evaluation.score import Items, Score

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from compressor.evaluation.shared_layers import SharedLayers

Tokens = NDArray[np.int64]
Predict = Callable[[Tokens], NDArray[np.integer]]
"""Token ids [B, T] to the top next token after each of them [B, T]."""
Split = Literal["search", "report"]

SKIPPED_POSITIONS = 4
"""First positions of a sequence are not scored: with hardly any context the choice is arbitrary."""
_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class AgreementText:
    """Sequences that the unpruned model wrote, and its top next token at every scored position.

    ``ids`` int64[n, T]; ``reference`` int32[n, T - skip], aligned with ``ids[:, skip:]``. Even rows
    are the search split, odd rows the report split. ``seed`` is that of the sampling.
    """

    ids: Tokens
    reference: NDArray[np.int32]
    skip: int = SKIPPED_POSITIONS
    seed: int = 0

    @classmethod
    def build(
        cls, ids: Tensor | Tokens, predict: Predict, seed: int = 0, skip: int = SKIPPED_POSITIONS
    ) -> AgreementText:
        """From sampled token ids [n, T] and the unpruned model's ``predict``.

        Raises ``InputError`` when there are too few sequences for two splits, or they are too short.
        """
        rows: Tokens = np.asarray(ids, dtype=np.int64)
        if rows.ndim != 2 or rows.shape[0] < 4 or rows.shape[1] <= skip:
            raise InputError(
                f"agreement needs at least 4 sequences of more than {skip} tokens, got shape {rows.shape}: "
                "sample more text"
            )
        top = predict(rows)
        return cls(rows, top[:, skip:].astype(np.int32), skip, seed)

    def score(self, predict: Predict, split: Split, limit: int | None = None) -> Score:
        """Share of scored positions where ``predict`` chooses the reference token.

        ``limit`` bounds the number of sequences. The interval takes sequences as the sampling unit.
        """
        return self._items(self._shares(predict, self.rows(split, limit)), split).score()

    def race(
        self,
        predict: Predict,
        rivals: Sequence[bytes],
        split: Split = "search",
        limit: int | None = None,
        alpha: float = 0.05,
    ) -> Raced:
        """Score, but stop once a rival agrees more at the error rate ``alpha``; see ``racing``.

        ``rivals`` are ``Score.items`` of sub-networks that are no worse in every other objective.
        """
        rows = self.rows(split, limit)
        shares = np.full(len(rows), np.nan)

        def evaluate(rung: int, items: Tokens) -> NDArray[np.float64]:
            del rung
            shares[items] = self._shares(predict, rows[items])
            return shares[items]

        return run_race(evaluate, lambda: self._items(shares, split), rivals, len(rows), self.seed, alpha)

    def rows(self, split: Split, limit: int | None = None) -> NDArray[np.intp]:
        """Row numbers of a split: even rows for the search, odd rows for the report."""
        return np.arange(0 if split == "search" else 1, len(self.ids), 2)[:limit]

    def task_key(self, split: Split, limit: int | None = None) -> str:
        """Name of this evaluation in the ledger: task, split, size, seed and the text's own hash."""
        n = len(self.rows(split, limit))
        return f"agreement:{split}:{n}x{self.ids.shape[1]}:seed{self.seed}:{self.digest}"

    @property
    def digest(self) -> str:
        """Hash of the text and its references."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ids, "<i8").tobytes())
        digest.update(np.ascontiguousarray(self.reference, "<i4").tobytes())
        return digest.hexdigest()[:12]

    def _shares(self, predict: Predict, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Share of each row's scored positions where ``predict`` chooses the reference token."""
        top = predict(self.ids[rows])
        shares: NDArray[np.float64] = (top[:, self.skip :] == self.reference[rows]).mean(axis=1)
        return shares

    def _items(self, shares: NDArray[np.float64], split: Split) -> Items:
        counts = np.full(len(shares), self.reference.shape[1], np.int64)
        return Items(shares, (f"agreement:{split}",), counts=counts)

    def save(self, path: Path) -> None:
        """Write an npz file, whole or not at all."""
        scratch = path.with_name(f".{path.name}.{os.getpid()}.npz")
        np.savez_compressed(
            scratch, ids=self.ids.astype(np.int32), reference=self.reference, skip=self.skip, seed=self.seed
        )
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> AgreementText:
        """What ``save`` wrote. Raises ``InputError`` on a damaged file."""
        try:
            with np.load(path) as data:
                return cls(
                    data["ids"].astype(np.int64), data["reference"], int(data["skip"]), int(data["seed"])
                )
        except Exception as error:
            raise InputError(
                f"{path} is not a readable agreement text ({error}): delete it to sample it again"
            ) from error


def torch_predict(model: PreTrainedModel, shared: SharedLayers | None = None) -> Predict:
    """Top next tokens by a LLaMA-like model, or by the sub-network activated in it when called.

    Runs the scorer's own forward pass and never holds logits of more than a few hundred positions. With
    ``shared``, layers that an earlier sub-network began with are not computed again.
    """
    import torch

    from compressor.evaluation.forward import PackedModel
    from compressor.evaluation.packing import pack_rows
    from compressor.evaluation.schedule import schedule

    def predict(ids: Tokens) -> NDArray[np.integer]:
        tokens = _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"])
        step = max(1, tokens // ids.shape[1])
        return np.concatenate([batch(ids[i : i + step]) for i in range(0, len(ids), step)])

    def batch(ids: Tokens) -> NDArray[np.integer]:
        with torch.inference_mode():
            packed = PackedModel(model, shared)
            steps = schedule(pack_rows(ids), packed.device, packed.dtype)
            hidden = packed.run(steps, ids.size)
            rows = packed.head.logit_rows
            top = torch.empty(ids.size, dtype=torch.long, device=hidden.device)

            def choose(start: int) -> None:
                top[start : start + rows] = packed.head.top_tokens(hidden[start : start + rows])

            packed.each(choose, range(0, ids.size, rows))
        result: NDArray[np.integer] = top.reshape(ids.shape).cpu().numpy()
        return result

    return predict


def logits_predict(logits: Callable[[Tokens], NDArray[np.float32]]) -> Predict:
    """Top next tokens by an engine that gives float32 logits [T, V] of one sequence int64[T]."""

    def predict(ids: Tokens) -> NDArray[np.integer]:
        return np.stack([logits(row).argmax(-1) for row in ids])

    return predict
