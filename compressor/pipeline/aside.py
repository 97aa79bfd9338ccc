"""The super-network's way off the GPU and back, while another engine owns the memory."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn


class Aside:
    """A model whose weights don't change. ``leave`` frees its GPU, ``back`` puts it there again.

    Weights are copied to the host once, where that can be into pinned memory, from which they return at
    the bus' full speed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._host: dict[int, Tensor] = {}
        self.gone = False

    def leave(self) -> None:
        if self.gone:
            return
        for tensor in self._tensors():
            kept = self._host.get(id(tensor))
            if kept is None:
                kept = tensor.detach().to("cpu", copy=True)
                kept = self._host[id(tensor)] = kept.pin_memory() if torch.cuda.is_available() else kept
            tensor.data = kept
        self.gone = True
        free_gpu()

    def back(self) -> None:
        if not self.gone:
            return
        for tensor in self._tensors():
            tensor.data = tensor.data.to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.gone = False

    def _tensors(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]


def free_gpu() -> None:
    """Give back what this process freed but holds of the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
