"""Exports that engine tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.engines.onnx_export import export
from compressor.engines.onnx_store import Export


@pytest.fixture(scope="session")
def tiny_export(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The tiny random Llama in 8 and 4 bits."""
    return export(tiny_model_folder, tmp_path_factory.mktemp("tiny-export") / "export", (8, 4))
