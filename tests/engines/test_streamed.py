"""A sub-network's logits without the whole model in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor.engines.streamed import streamed_logits
from compressor.errors import InputError
from compressor.space import SubNetwork
from tests.conftest import make_tiny_model
from tests.engines.reference import cut, logits

IDS = np.arange(40, 80, dtype=np.int64)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"mlp_bias": True, "attention_bias": True}]
)
@pytest.mark.parametrize(
    "subnet",
    [SubNetwork((0, 2, 3), (64, 128, 96)), SubNetwork((0, 1, 2, 3), (128,) * 4)],
    ids=["cut", "whole"],
)
def test_logits_are_those_of_the_sub_network(
    tmp_path: Path, changes: dict[str, bool], subnet: SubNetwork
) -> None:
    folder = make_tiny_model(tmp_path / "model", **changes)
    expected = logits(cut(folder, subnet), IDS[None])[0]
    np.testing.assert_allclose(streamed_logits(folder, subnet, IDS), expected, atol=1e-5)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        streamed_logits(folder, SubNetwork((0,), (64,)), IDS)
