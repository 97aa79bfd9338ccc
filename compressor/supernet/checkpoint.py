"""Checkpoints of a fine-tuning, written so that a killed run or a full disk leaves the last good one."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RunConflictError, TrainingError

NAME = "checkpoint.pt"


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
