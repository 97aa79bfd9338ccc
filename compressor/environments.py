"""Where vLLM is installed: in the environment that runs this, or in one of its own beside it.

vLLM pins what the rest of this program does not, so ``make setup-vllm`` makes it ``.venv-vllm``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from compressor.errors import PackageError
from compressor.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]
REMEDY = "`make setup-vllm` installs it, for the GPU where there is one"


def vllm_python() -> Path | None:
    """The Python that has vLLM: this one, or that of ``make setup-vllm``; None if there is none."""
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    other = ROOT / ".venv-vllm" / "bin" / "python"
    return other if other.is_file() else None


def python_for(package: Path) -> Path:
    """The Python whose environment has a package's engine; this one where that is nowhere, or no package."""
    try:
        engine = read_manifest(package).engine
    except PackageError:
        return Path(sys.executable)
    other = vllm_python() if engine == "vllm" else None
    return other or Path(sys.executable)
