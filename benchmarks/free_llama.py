"""llama.cpp's quantizations of a run's unpruned model, and how near each is to it.

Everything of llama.cpp runs in its own environment (``make setup-llama``); without it there are no rows.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.engines.gguf_file import write_gguf
from compressor.models import read_shape, resolve
from compressor.runfolder import RunFolder
from compressor.space import SubNetwork

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-llama" / "bin" / "python"
KINDS = {"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q4_0": 2, "Q4_1": 3, "Q3_K_M": 12, "Q2_K": 10}
"""llama.cpp's names of file types, and their numbers in llama.h."""
_QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize = int(sys.argv[3]), True
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
_SCORE = """
import sys, numpy, llama_cpp
ids = numpy.load(sys.argv[2])
model = llama_cpp.Llama(sys.argv[1], n_ctx=ids.shape[1], n_batch=ids.shape[1], logits_all=True, verbose=False)
found = []
for row in ids:
    model.reset()
    model.eval(row.tolist())
    found.append(numpy.array(model.scores[: len(row)], numpy.float32))
numpy.save(sys.argv[3], numpy.stack(found))
"""


def llama_rows(
    folder: RunFolder, ids: Mapping[str, npt.NDArray[np.int64]], expected: Mapping[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """Fields of an ``Entry`` for each kind; none where llama.cpp is not installed."""
    if not PYTHON.is_file():
        print("llama.cpp's rows are left out: `make setup-llama` builds it")
        return []
    rows = []
    with TemporaryDirectory(dir=folder.path) as scratch:
        source = Path(scratch) / "source.gguf"
        shape = read_shape(resolve(str(folder.base)))
        whole = SubNetwork(tuple(range(shape.num_layers)), (shape.intermediate_size,) * shape.num_layers)
        write_gguf(folder.base, whole, source, {"name": "unpruned", "base_model": "starter"}, numerics="bf16")
        for kind, number in KINDS.items():
            path = Path(scratch) / f"{kind}.gguf"
            _run(_QUANTIZE, source, path, str(number))
            rows.append(_row(f"llama.cpp {kind}", path, ids, expected))
            path.unlink()
    return rows


def _row(
    name: str,
    path: Path,
    ids: Mapping[str, npt.NDArray[np.int64]],
    expected: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    from free import nearness

    figures = {}
    for text, rows in ids.items():
        asked, told = path.with_suffix(".ids.npy"), path.with_suffix(".npy")
        np.save(asked, rows)
        _run(_SCORE, path, asked, told)
        found = torch.from_numpy(np.load(told)).log_softmax(-1)
        sums = [
            nearness(torch.from_numpy(row), wanted, own)
            for row, wanted, own in zip(rows, expected[text], found, strict=True)
        ]
        figures[text] = np.mean(sums, axis=0)
        told.unlink()
    return {
        "name": name,
        "bytes": path.stat().st_size,
        "perplexity": float(np.exp(figures["wikitext-2"][2])),
        "kl": {text: float(f[0]) for text, f in figures.items()},
        "agreement": {text: float(f[1]) for text, f in figures.items()},
    }


def _run(code: str, *arguments: Path | str) -> None:
    command = [str(PYTHON), "-c", code, *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
