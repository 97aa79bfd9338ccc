"""Four formats of one sub-network of the starter, each loaded by its own stock runtime.

In full precision all must write the same greedy text; quantized, each is put beside the bf16 sub-network:
bytes, NLL and divergence on wikitext-2, tokens/s. Prints a table, then one line of JSON with the bounds;
exits 1 if one falls short. The layers differ in width; the sub-network is not tuned, or is --run's winner.
Needs `make setup setup-vllm setup-llama` and ../shared/data.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoTokenizer
from verdict import Bound, conclude

from compressor import models
from compressor.engines.host import host_faults
from compressor.events import ignore
from compressor.pipeline.exporting import export as write_format
from compressor.space import SubNetwork
from compressor.supernet.importance import rank, sort_neurons

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "wikitext2"
PYTHONS = {
    "transformers": ROOT / ".venv" / "bin" / "python",
    "onnxruntime": ROOT / ".venv" / "bin" / "python",
    "vllm": ROOT / ".venv-vllm" / "bin" / "python",
    "llama.cpp": ROOT / ".venv-llama" / "bin" / "python",
}
PROMPTS = ("The capital of France is", "def add(a, b):", "Once upon a time")
NEW_TOKENS = 24
ROWS, LENGTH = 8, 256
TIMED_PROMPT, TIMED_TOKENS = 64, 48
DROPPED = 4
WIDTHS = (1536, 1152, 1536, 1536, 768, 1536)
"""Widths of consecutive layers, repeated."""


@dataclass(frozen=True)
class Artefact:
    """One way to write the sub-network, and what loads it; ``full`` precision must write the same text."""

    label: str
    runtime: str
    form: str
    numerics: str
    portable: bool = False
    full: bool = False


ARTEFACTS = (
    Artefact("transformers, bf16 folder", "transformers", "hf", "bf16", full=True),
    Artefact("onnxruntime-genai, bf16", "onnxruntime", "onnx", "bf16", full=True),
    Artefact("vLLM with plugin, fp32", "vllm", "vllm", "fp32", full=True),
    Artefact("vLLM portable, fp32", "vllm", "vllm", "fp32", portable=True, full=True),
    Artefact("llama.cpp, fp32", "llama.cpp", "gguf", "fp32", full=True),
    Artefact("onnxruntime-genai, INT8", "onnxruntime", "onnx", "int8"),
    Artefact("vLLM with plugin, W8A8", "vllm", "vllm", "int8"),
    Artefact("vLLM portable, W8A8", "vllm", "vllm", "int8", portable=True),
    Artefact("llama.cpp, Q8_0", "llama.cpp", "gguf", "q8_0"),
)


@dataclass(frozen=True)
class Result:
    """What an artefact is and does; ``nll`` and ``kl`` in nats a token."""

    artefact: Artefact
    bytes: int
    write_seconds: float
    text: list[list[int]]
    nll: float
    kl: float
    tok_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a finished run whose winner is taken")
    parser.add_argument("--only", default="", help="runtimes, comma-separated (transformers always)")
    parser.add_argument("--work", type=Path, help="folder to go on from, and to keep finished rows in")
    options = parser.parse_args()
    for fault in host_faults():
        print(f"not fit to measure on: {fault}")
    wanted = set(filter(None, options.only.split(",")))
    artefacts = [a for a in ARTEFACTS if not wanted or a.runtime in {"transformers", *wanted}]
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        results = _all(artefacts, options.run or _make_subnetwork(work / "sorted"), work)
    return _report(results)


def _make_subnetwork(folder: Path) -> Path:
    """The starter, neurons sorted, with layers dropped and narrowed in place of a run's winner."""
    if (folder / "subnet.json").is_file():
        return folder
    loaded = models.load(models.resolve("starter"), torch.float32)
    ids = loaded.tokenizer((DATA / "valid.txt").read_text(encoding="utf-8")[:40_000])["input_ids"]
    importance = rank(loaded.model, [torch.tensor(ids[:4096]).reshape(8, 512)])
    sort_neurons(loaded.model, importance)
    with models.quiet_progress():
        loaded.model.bfloat16().save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    layers = tuple(sorted(importance.drop_order[DROPPED:]))
    widths = tuple(WIDTHS[i % len(WIDTHS)] for i in range(len(layers)))
    (folder / "subnet.json").write_text(json.dumps(SubNetwork(layers, widths).to_dict()))
    return folder


def _all(artefacts: Sequence[Artefact], source: Path, work: Path) -> list[Result]:
    tokenizer = AutoTokenizer.from_pretrained(
        source if (source / "config.json").is_file() else source / "supernet"
    )
    ids = tokenizer((DATA / "test.txt").read_text(encoding="utf-8")[:60_000])["input_ids"]
    scored = np.array(ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    results = []
    for number, artefact in enumerate(artefacts, 1):
        print(f"{number} of {len(artefacts)}: {artefact.label}", file=sys.stderr)
        kept = work / f"{artefact.label}.json"
        if kept.is_file():
            results.append(Result(artefact, **json.loads(kept.read_text())))
            continue
        results.append(_result(artefact, source, prompts, scored, work, {tokenizer.eos_token_id}))
        kept.write_text(json.dumps({k: v for k, v in asdict(results[-1]).items() if k != "artefact"}))
    return results


def _result(
    artefact: Artefact,
    source: Path,
    prompts: list[list[int]],
    scored: np.ndarray,
    work: Path,
    ends: set[int],
) -> Result:
    """Write an artefact, load it in its runtime, score what that computed, and remove the artefact."""
    target, reference = work / "artefact", work / "reference.npy"
    if target.exists():
        _remove(target)
    began = time.perf_counter()
    _write(artefact, source, target)
    seconds = time.perf_counter() - began
    logits = work / "logits.npy" if reference.is_file() else reference
    answer = _ask(artefact, target, prompts, scored, logits)
    text = [_until_end(row, ends) for row in answer["text"]]
    nll, kl = _score(np.load(logits, mmap_mode="r"), np.load(reference, mmap_mode="r"), scored)
    size = _bytes(target)
    _remove(target)
    return Result(artefact, size, seconds, text, nll, kl, answer["decode_tok_s"])


def _write(artefact: Artefact, source: Path, target: Path) -> None:
    if not (source / "subnet.json").is_file():
        write_format(source, artefact.form, "winner", artefact.numerics, artefact.portable, target, ignore)
        return
    from compressor.pipeline.exporting import FORMATS, Origin

    subnet = SubNetwork.from_dict(json.loads((source / "subnet.json").read_text()))
    fields = {"name": "starter-26", "base_model": "SmolLM2-135M-Instruct", "license": "apache-2.0"}
    FORMATS[artefact.form].write(Origin(source, subnet, fields), target, artefact.numerics, artefact.portable)


def _ask(
    artefact: Artefact, path: Path, prompts: list[list[int]], scored: np.ndarray, logits: Path
) -> dict[str, Any]:
    request = {
        "runtime": artefact.runtime,
        "path": str(path),
        "threads": len(os.sched_getaffinity(0)),
        "prompts": prompts,
        "new": NEW_TOKENS,
        "scored": scored.tolist(),
        "logits": str(logits),
        "timed": scored[0, :TIMED_PROMPT].tolist(),
        "timed_tokens": TIMED_TOKENS,
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if artefact.portable or artefact.runtime != "vllm":
        environment["VLLM_PLUGINS"] = "none"
    elif "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    script = str(Path(__file__).with_name("formats_runtime.py"))
    done = subprocess.run(
        [str(PYTHONS[artefact.runtime]), "-P", script],  # -P: what lies beside the script hides no package
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        cwd=path.parent,
    )
    if done.returncode:
        sys.exit(f"{artefact.label}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def _score(logits: np.ndarray, reference: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    """NLL of the text, and the divergence from the reference."""
    nll, kl = [], []
    for row, ours, theirs in zip(ids, logits, reference, strict=True):
        q, p = (torch.from_numpy(np.array(values)).log_softmax(-1) for values in (ours, theirs))
        nll.append(-q[:-1].gather(-1, torch.from_numpy(row[1:, None])).mean().item())
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
    return float(np.mean(nll)), float(np.mean(kl))


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _report(results: Sequence[Result]) -> int:
    reference = results[0]
    columns = {"MB": 8, "of bf16": 9, "NLL": 9, "to bf16": 9, "KL": 9, "tok/s": 8, "text": 7, "s": 7}
    print(" " * 28 + "".join(f"{name:>{width}s}" for name, width in columns.items()))
    for r in results:
        same = "same" if r.text == reference.text else "-"
        print(
            f"{r.artefact.label:28s}{r.bytes / 1e6:8.1f}{r.bytes / reference.bytes:9.3f}{r.nll:9.4f}"
            f"{r.nll / reference.nll - 1:+9.2%}{r.kl:9.4f}{r.tok_s:8.1f}{same:>7s}{r.write_seconds:7.1f}"
        )
    return conclude(list(_checks(results)), {"figures": _figures(results)})


def _checks(results: Sequence[Result]) -> list[Bound]:
    reference = results[0]
    full = [r for r in results if r.artefact.full]
    checks = [Bound(f"{r.artefact.label}: other greedy texts", _others(r, reference), 0.0) for r in full]
    for r in results:
        loss = r.nll / reference.nll - 1
        if r.artefact.label == "onnxruntime-genai, INT8":
            checks.append(Bound("INT8 package of the bf16 folder's bytes", r.bytes / reference.bytes, 0.53))
            checks.append(Bound("ONNX Runtime INT8: NLL above bf16", loss, 0.005))
            checks.append(Bound("a package, s", r.write_seconds, 60))
        elif r.artefact.label == "vLLM with plugin, W8A8":
            checks.append(Bound("vLLM W8A8: NLL above bf16", loss, 0.01))
    return checks


def _others(result: Result, reference: Result) -> float:
    return float(sum(a != b for a, b in zip(result.text, reference.text, strict=True)))


def _figures(results: Sequence[Result]) -> Mapping[str, Any]:
    return {r.artefact.label: {"bytes": r.bytes, "nll": r.nll, "kl": r.kl, "tok_s": r.tok_s} for r in results}


if __name__ == "__main__":
    sys.exit(main())
