"""The output layer (LM head): from final hidden states to what is wanted of their logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.evaluation import kernels, products
from compressor.evaluation.kernels import Workspace
from compressor.evaluation.products import Means

_LOGIT_ROWS = {"cpu": 256, "cuda": 2048}
"""Positions whose logits are best held at once."""
_UNHELD_ROWS = 2048
"""Positions that are best taken at once where logits are not held."""
_SOFTMAX_ROWS = 4
"""Positions whose logits are held in fp32 at once: few enough to stay in the cache."""
_ARGMAX_BLOCK = 128


class Head:
    """A model's output layer, computed on blocks of positions, which may be taken side by side."""

    def __init__(self, module: Any, device: torch.device, means: Means, memory: Workspace) -> None:
        self._module, self._fused, self._memory = module, means.fused, memory
        plain = type(module) is nn.Linear and module.bias is None
        self._plain_on_cpu = device.type == "cpu" and plain
        self._tiled = means.tiled and plain and products.suit_vocabulary(module.weight)
        self.logit_rows = _LOGIT_ROWS.get(device.type, _LOGIT_ROWS["cpu"])

    def block_rows(self, rows: int, workers: int) -> int:
        """Positions to ask the likelihoods of at once, of so many that so many workers share."""
        if not self._tiled:
            return self.logit_rows
        blocks = max(1, -(-rows // (workers * _UNHELD_ROWS))) * workers
        return max(1, -(-rows // blocks))

    def likelihoods(
        self, hidden: Tensor, rows: NDArray[np.int64], targets: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-probability of each target token after the position of ``hidden`` [N, hidden] that ``rows``
        (ascending) names, and whether no token is likelier."""
        if self._tiled:
            starts = np.searchsorted(rows, np.arange(len(hidden) + 1))
            chosen, largest, normaliser = products.vocabulary_scores(
                hidden, self._module.weight, starts, targets, self._memory
            )
            places = torch.from_numpy(rows)
        else:
            logits = self.logits(hidden)
            places, wanted = (torch.from_numpy(array).to(logits.device) for array in (rows, targets))
            chosen = logits[places, wanted].float()
            largest, normaliser = self._largest_and_normaliser(logits)
        logprobs = (chosen - normaliser[places]).double().cpu().numpy()
        return logprobs, (chosen >= largest[places]).cpu().numpy()

    def top_tokens(self, hidden: Tensor) -> Tensor:
        """int64[N]: the likeliest token after each position."""
        return top_tokens(self.logits(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocabulary] of final hidden states [n, hidden], valid until the thread's next call.

        On a CPU they lie in one buffer, since the page faults of fresh memory cost a tenth of the product.
        """
        module = self._module
        if not self._plain_on_cpu:
            output: Tensor = module(hidden)
            return output
        buffer = self._memory.take("logits", len(hidden), module.out_features, hidden)
        return torch.mm(hidden, module.weight.t(), out=buffer)

    def _largest_and_normaliser(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Largest logit and log of the sum of exponentials of each row, in fp32."""
        if self._fused:
            largest, total = kernels.largest_and_total(logits)
            return largest, total.log_().add_(largest)
        top = logits.amax(-1).float()
        rows = _SOFTMAX_ROWS if logits.device.type == "cpu" else len(logits)
        parts = zip(torch.split(logits, rows), torch.split(top[:, None], rows), strict=True)
        sums = [part.float().sub_(most).exp_().sum(-1) for part, most in parts]
        return top, torch.cat(sums).log_().add_(top)


def top_tokens(logits: Tensor) -> Tensor:
    """First index of the largest logit of each row [N, V]; in two stages, since argmax is slow in bf16."""
    vocabulary = logits.shape[-1]
    if vocabulary % _ARGMAX_BLOCK:
        return logits.argmax(-1)
    blocks = logits.view(len(logits), -1, _ARGMAX_BLOCK)
    best = blocks.amax(-1).argmax(-1)
    within = blocks[torch.arange(len(logits), device=logits.device), best].argmax(-1)
    return best * _ARGMAX_BLOCK + within
