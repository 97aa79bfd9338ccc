"""What both methods are calibrated on in tests, and how a model's function is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture
def batches() -> list[Tensor]:
    """Token ids, four times (4, 24)."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(97, (4, 24), generator=generator) for _ in range(4)]


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found
