"""The unpruned model as a run keeps it, and where and in what numerics the run computes."""

from __future__ import annotations

import torch

from compressor import models
from compressor.models import LoadedModel
from compressor.pipeline.context import Context


def load_base(context: Context, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """The unpruned model from the run's own copy."""
    return models.load(models.resolve(str(context.folder.base)), dtype)


def load_to_compute(context: Context) -> LoadedModel:
    """The unpruned model where and in what this run computes."""
    loaded = load_base(context, compute_dtype(context))
    loaded.model.to(compute_device())
    return loaded


def compute_device() -> torch.device:
    """Where text is written, the super-network tuned and sub-networks scored: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(context: Context) -> torch.dtype:
    """What this run writes text, tunes and scores in: decided once, so that a resumed run does the same."""
    dtype: torch.dtype = getattr(torch, str(context.folder.result("base").get("compute", "bfloat16")))
    return dtype
