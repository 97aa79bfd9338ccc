"""The processes that share a fine-tuning, started by ``accelerate launch`` or alone.

Every process draws the same sub-networks and the same batch, computes its part of the batch, and adds
up gradients with the others, so that the result is that of one process with the whole batch. Each holds
the whole model, or with ``accelerate launch --use_fsdp`` a part of its layers (``sharding``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from compressor.errors import InputError, TrainingError


@dataclass(frozen=True)
class Processes:
    """``rank`` of ``count`` processes; ``sharded``: each holds a part of the layers."""

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def device(self) -> torch.device:
        """The process's own: its GPU, or the CPU."""
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )

    def part(self, rows: list[int]) -> list[int]:
        """This process's share of a batch."""
        return rows[self.rank :: self.count]

    @torch.no_grad()
    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over all processes, in place, in fp32."""
        if self.count > 1:
            for tensor in tensors:
                summed = tensor.float()
                dist.all_reduce(summed)
                tensor.copy_(summed)

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        holder = torch.tensor([value], dtype=torch.float64)
        if self.count > 1:
            holder = holder.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(holder)
        return float(holder)

    def must_agree(self, fingerprint: str) -> None:
        """Raise ``InputError`` in every process if their fingerprints of what they tune differ."""
        number = int(hashlib.sha256(fingerprint.encode()).hexdigest()[:8], 16)
        if self.total(number) != self.count * number:
            raise InputError(
                "the processes hold different models, data or settings: load and sort the same in each"
            )

    def fail_together(self, error: TrainingError | None) -> None:
        """Raise in every process what one of them has to raise: the others would wait for it forever."""
        if self.total(float(error is not None)):
            raise error or TrainingError("another process could not go on: its message says why")


def join_processes() -> Processes:
    """The processes that the launcher started (their group is formed on the first call)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, parse_flag_from_env("ACCELERATE_USE_FSDP"))
