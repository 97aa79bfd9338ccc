"""Checkpoints of a fine-tuning, written so that a killed run or a full disk leaves the last good one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter

from compressor.errors import RunConflictError, TrainingError
from compressor.space import SearchSpace
from compressor.supernet.config import FinetuneConfig
from compressor.supernet.data import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "checkpoint.pt"
SAMPLED = 64
"""Elements of a parameter that tell it from another model's."""


def tuning_identity(
    space: SearchSpace,
    config: FinetuneConfig,
    examples: Examples,
    model: PreTrainedModel,
    trained: list[Parameter],
) -> str:
    """Hash of all that decides a tuning: of the model a sample of what a checkpoint does not hold."""
    digest = hashlib.sha256(json.dumps([space.to_dict(), asdict(config)], sort_keys=True).encode())
    digest.update(examples.ids.numpy().tobytes())
    digest.update(examples.labels.numpy().tobytes())
    held = {id(parameter) for parameter in trained}
    kept = [parameter for parameter in model.parameters() if id(parameter) not in held]
    digest.update(sample([*kept, *model.get_input_embeddings().parameters()]).encode())
    return digest.hexdigest()


def sample(parameters: Iterable[Parameter]) -> str:
    """Hash of elements spread over each parameter."""
    digest = hashlib.sha256()
    for parameter in parameters:
        flat = parameter.detach().flatten()
        spread = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        digest.update(spread.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write beside the old one, flush, then replace it. Raises ``TrainingError`` on a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{NAME}.tmp"
    try:
        with scratch.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(folder / NAME)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise TrainingError(
            f"cannot write a checkpoint to {folder} ({error}): free disk space and resume from the last one"
        ) from error


def load_checkpoint(folder: Path, identity: str) -> dict[str, Any] | None:
    """The state saved in ``folder``, or None. Raises ``RunConflictError`` if it is of another tuning."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise RunConflictError(f"{path} is damaged ({error}): delete it to tune from the start") from error
    if state.get("identity") != identity:
        raise RunConflictError(
            f"{path} is of another model, search space or fine-tuning: delete it or choose another folder"
        )
    return state


def remove_checkpoint(folder: Path) -> None:
    (folder / NAME).unlink(missing_ok=True)
