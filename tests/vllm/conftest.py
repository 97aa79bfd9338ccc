"""A tiny random Llama that vLLM's CPU attention takes, and sub-networks of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.space import SubNetwork
from tests.conftest import make_tiny_model

FIELDS = {"name": "tiny", "base_model": "random-llama"}
UNEVEN = SubNetwork((0, 1, 3), (128, 64, 96))
"""Three of the tiny model's four layers, each of another width."""


@pytest.fixture(scope="session")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like ``tiny_model_folder``, with heads of 32 (vLLM knows no smaller) and weights large enough
    that greedy text varies. Treat the folder as read-only."""
    return make_tiny_model(
        tmp_path_factory.mktemp("supernet") / "model",
        head_dim=32,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
