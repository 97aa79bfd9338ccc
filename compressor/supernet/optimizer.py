"""AdamW on fp32 master copies of bf16 weights, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from compressor.supernet.sharding import gathered, shared_out


class MasterAdamW:
    """AdamW that keeps weights in fp32 beside the model's low-precision ones.

    bf16 has 8 bits of mantissa: small updates added to it directly would vanish. Parameters that are
    fp32 already are their own masters.
    """

    def __init__(
        self, parameters: Sequence[Parameter], lr: float, weight_decay: float, betas: tuple[float, float]
    ) -> None:
        self._parameters = list(parameters)
        self._masters = [
            p if p.dtype == torch.float32 else Parameter(p.detach().float()) for p in self._parameters
        ]
        decayed = [m for m in self._masters if m.dim() > 1]
        plain = [m for m in self._masters if m.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)

    def step(self, lr: float, max_norm: float) -> float:
        """Apply the gradients, clipped to ``max_norm``; returns their norm, infinite or NaN if broken."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter is not master and parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None
        found = [m for m in self._masters if m.grad is not None]
        norm = float(gathered(torch.nn.utils.clip_grad_norm_(found, max_norm)))
        if math.isfinite(norm):
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
            self._publish()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, also of sharded parameters: all processes must ask for it."""
        adam = self._adam.state_dict()
        moments = {
            index: {name: gathered(value) for name, value in kept.items()}
            for index, kept in adam["state"].items()
        }
        masters = [gathered(m.detach()) for m in self._masters]
        return {"masters": masters, "adam": {**adam, "state": moments}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the masters, and the model's weights from them."""
        masters: list[Tensor] = state["masters"]
        with torch.no_grad():
            for master, saved in zip(self._masters, masters, strict=True):
                master.copy_(shared_out(saved, master))
        order = [p for group in self._adam.param_groups for p in group["params"]]
        moments = {
            index: {n: shared_out(v, order[index]) if v.dim() else v for n, v in kept.items()}
            for index, kept in state["adam"]["state"].items()
        }
        self._adam.load_state_dict({**state["adam"], "state": moments})
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)


def warmup_cosine(progress: float, warmup: float, floor: float = 0.05) -> float:
    """Factor of the learning rate at ``progress`` (0 to 1): linear up to ``warmup``, cosine to ``floor``."""
    if progress < warmup:
        return max(progress / warmup, 0.05)
    past = min(1.0, (progress - warmup) / max(1e-9, 1.0 - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * past))
