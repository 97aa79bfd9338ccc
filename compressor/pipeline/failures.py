"""What a failed evaluation means: whether to try again, to leave the sub-network out, or to stop."""

from __future__ import annotations

from typing import Literal

from compressor.errors import CompressorError, MemoryExhaustedError, UnfitMachineError, WorkerDiedError
from compressor.ledger import Key, Row, Status
from compressor.space import SubNetwork

Kind = Literal["memory", "worker", "poisoned", "unfit", "failed"]
"""Memory ran out; a worker died; this process' GPU is lost; the machine lacks something; anything else."""

EXPECTED = (CompressorError, RuntimeError, MemoryError)
"""What an evaluation may end with; anything else is a fault of this program."""
IN_A_ROW = 3
"""Failures one after the other that stop a search."""
CIRCUMSTANCE = "circumstance"
"""Among a failed row's details: it failed by what happened around it, and is asked for again on resume."""

_POISONED = ("cuda error", "device-side assert", "cudnn_status", "cublas_status")


def kind_of(error: BaseException) -> Kind:
    """What an evaluation's error means."""
    if isinstance(error, WorkerDiedError):
        return "worker"
    if isinstance(error, (MemoryExhaustedError, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
        return "memory"
    if isinstance(error, UnfitMachineError):
        return "unfit"
    text = str(error).lower()
    if type(error).__name__ == "AcceleratorError" or any(word in text for word in _POISONED):
        return "poisoned"
    return "failed"


def failed_row(key: Key, subnet: SubNetwork, error: BaseException) -> Row:
    """What the ledger keeps of an evaluation that failed in the end."""
    kind = kind_of(error)
    status: Status = "infeasible" if kind in ("memory", "unfit") else "failed"
    details: dict[str, object] = {"error": f"{type(error).__name__}: {error}"}
    if kind == "worker":
        details[CIRCUMSTANCE] = True
    return Row(key, subnet, {}, status, details)
