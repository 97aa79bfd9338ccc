"""Which Python an engine is in."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Literal

import pytest

from compressor import environments
from compressor.environments import python_for, vllm_python
from compressor.manifest import Architecture, Manifest, write_manifest

HERE = Path(sys.executable)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vLLM is in this environment itself"
)


@pytest.fixture
def vllms_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Python of an environment beside this one."""
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    return python


def test_vllm_is_found_in_an_environment_of_its_own(vllms_own: Path) -> None:
    assert vllm_python() == vllms_own
    vllms_own.unlink()
    assert vllm_python() is None


def test_only_a_vllm_package_leaves_this_python(vllms_own: Path, tmp_path: Path) -> None:
    assert python_for(_package(tmp_path / "v", "vllm")) == vllms_own
    assert python_for(_package(tmp_path / "o", "onnxruntime")) == HERE
    assert python_for(tmp_path / "nothing") == HERE
    vllms_own.unlink()
    assert python_for(tmp_path / "v") == HERE, "which says what is missing"


def _package(folder: Path, engine: Literal["onnxruntime", "vllm"]) -> Path:
    folder.mkdir()
    manifest = Manifest(
        name="model",
        base_model="model",
        engine=engine,
        numerics="int8",
        architecture=Architecture(layers=[0], widths=[8], bits=[8]),
        parameters=1,
        weight_bytes=1,
        context_length=8,
    )
    write_manifest(folder, manifest)
    return folder
