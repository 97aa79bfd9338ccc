"""Can a figure be believed, and what does it cost? All on the starter, in ONNX Runtime.

Prints a table, then one line of JSON with figures and bounds; exits 1 if a figure falls short. Without
../shared/data the agreement of logits is left out; without --llama-python the comparison with llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from scipy.stats import spearmanr

from compressor import models
from compressor.engines.host import host_faults
from compressor.engines.onnx_export import export
from compressor.engines.onnx_graph import build_graph
from compressor.engines.onnx_verify import mean_kl
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.speed import fit_speed, panel
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import SearchSpace, SubNetwork, flops_per_token

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2" / "test.txt"
WORKLOAD = Workload(prompt_tokens=128, output_tokens=32)
PANEL = 24
REPEATS = 5
LLAMA = """
import json, sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, n_threads=2, n_threads_batch=2, n_batch=512, verbose=False)
prompt = [int(t) for t in sys.argv[2].split(",")]
prefills, steps = [], []
for repeat in range(6):
    model.reset()
    began = time.perf_counter(); model.eval(prompt); prefills.append(time.perf_counter() - began)
    for _ in range(31):
        began = time.perf_counter(); model.eval([17]); steps.append(time.perf_counter() - began)
middle = lambda values: 1e3 * sorted(values)[len(values) // 2]
print(json.dumps([middle(prefills[1:]), middle(steps[31:])]))
"""


@dataclass(frozen=True)
class Figure:
    """One figure beside its bound."""

    name: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between the five repeats")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for one measurement")
    parser.add_argument("--llama-python", default="", help="a Python that imports llama_cpp")
    parser.add_argument("--llama-model", default="", help="the starter as Q8_0 GGUF")
    options = parser.parse_args()
    for fault in host_faults():
        print(f"not fit to measure on: {fault}")
    with tempfile.TemporaryDirectory() as scratch:
        base = models.to_folder(models.resolve("starter"), Path(scratch) / "model")
        engine = OnnxRuntimeEngine(export(base, Path(scratch) / "export", (8, 4)).folder)
        figures = [*_building(engine), *_repeating(engine, options), *_panel(engine, options)]
        figures += _logits(engine, base)
        if options.llama_python and options.llama_model:
            figures += _beside_llama(engine, options)
    for f in figures:
        verdict = "met" if f.met else "MISSED"
        print(f"{f.name:55s} {f.value:10.4g}  {'<=' if f.at_most else '>='} {f.bound:<8g} {verdict}")
    print(json.dumps({f.name: {"value": f.value, "bound": f.bound, "met": f.met} for f in figures}))
    return 0 if all(f.met for f in figures) else 1


def _space(engine: OnnxRuntimeEngine) -> SearchSpace:
    return SearchSpace.from_fractions(engine.export.shape, (0.7, 0.8, 0.9, 1.0), (0.5, 0.75, 1.0))


def _building(engine: OnnxRuntimeEngine) -> Iterator[Figure]:
    """A candidate's cost before it is measured."""
    space = _space(engine)
    engine.export.prepare(space.widths)
    subnet = space.sample(np.random.default_rng(0))
    engine.build(subnet)
    began = time.perf_counter()
    engine.build(space.sample(np.random.default_rng(1)))
    yield Figure("build and load a candidate, s", time.perf_counter() - began, 1.0)
    graph = build_graph(engine.export.shape, engine.export.constants, engine.export.tensors(space.full))
    yield Figure("bytes of the largest candidate", len(graph.SerializeToString()), 200_000)


def _repeating(engine: OnnxRuntimeEngine, options: argparse.Namespace) -> Iterator[Figure]:
    """One candidate, measured again and again in turns with the reference."""
    space = _space(engine)
    candidate, reference = engine.build(space.smallest), engine.build(space.full)
    taken = []
    for repeat in range(REPEATS):
        time.sleep(options.pause if repeat else 0.0)
        seconds = 2 * options.seconds
        taken.append(engine.bench_against(candidate, reference, WORKLOAD, max_seconds=seconds))
    for name in ("ttft", "tpot"):
        ratios = [m.conditions[f"{name}_ratio"] for m in taken]
        absolute = [getattr(m, f"{name}_ms") for m in taken]
        print(f"{name}: ratios {[round(r, 3) for r in ratios]}, ms {[round(a, 2) for a in absolute]}")
        yield Figure(f"{name} ratio of five repeats, max/min", max(ratios) / min(ratios), 1.05)


def _panel(engine: OnnxRuntimeEngine, options: argparse.Namespace) -> Iterator[Figure]:
    """24 sub-networks: figures against arithmetic, and the predictor on those it never saw."""
    space = _space(engine)
    reference = engine.build(space.full)
    rng = np.random.default_rng(0)
    subnets = list(dict.fromkeys([*panel(space), *(space.sample(rng) for _ in range(PANEL))]))[:PANEL]
    taken = [
        engine.bench_against(engine.build(s), reference, WORKLOAD, max_seconds=options.seconds)
        for s in subnets
    ]
    flops = [flops_per_token(space.shape, s) for s in subnets]
    for name in ("ttft", "tpot"):
        ratios = [m.conditions[f"{name}_ratio"] for m in taken]
        yield Figure(
            f"rank correlation of {name} with FLOPs", float(spearmanr(flops, ratios)[0]), 0.95, False
        )
    yield from _prediction(subnets, taken, len(panel(space)))


def _prediction(subnets: list[SubNetwork], taken: list[Measurement], known: int) -> Iterator[Figure]:
    scale = {
        n: float(np.median([m.conditions[f"reference_{n}_ms"] for m in taken])) for n in ("ttft", "tpot")
    }
    figures = {n: [m.conditions[f"{n}_ratio"] * scale[n] for m in taken] for n in scale}
    model = fit_speed(subnets[:known], figures["ttft"][:known], figures["tpot"][:known])
    assert model is not None
    estimates = [model.predict(s) for s in subnets[known:]]
    for name in scale:
        errors = [
            abs(getattr(e, f"{name}_ms") / real - 1)
            for e, real in zip(estimates, figures[name][known:], strict=True)
        ]
        yield Figure(f"predictor's error on held-out {name}, median", float(np.median(errors)), 0.07)
        print(f"predictor {name}: largest error {max(errors):.3f}, stated {model.error:.3f}")


def _logits(engine: OnnxRuntimeEngine, base: Path) -> Iterator[Figure]:
    if not DATA.is_file():
        print(f"no {DATA}: logits are not compared")
        return
    import torch

    loaded = models.load(models.resolve(str(base)), torch.float32)
    text = DATA.read_text(encoding="utf-8")[:5000]
    ids = np.array(loaded.tokenizer(text).input_ids[:500], np.int64)
    with torch.inference_mode():
        expected = loaded.model(torch.from_numpy(ids[None])).logits[0].numpy()
    ours = engine.logits(engine.build(_space(engine).full), ids)
    yield Figure("KL of INT8 to fp32 on 500 tokens, nats", mean_kl(expected, ours), 0.02)


def _beside_llama(engine: OnnxRuntimeEngine, options: argparse.Namespace) -> Iterator[Figure]:
    """Our INT8 and llama.cpp's Q8_0 in turns, the better of three each."""
    full = engine.build(_space(engine).full)
    prompt = ",".join(str(i) for i in np.random.default_rng(0).integers(10, 40_000, WORKLOAD.prompt_tokens))
    command = [options.llama_python, "-c", LLAMA, options.llama_model, prompt]
    ours, theirs = [], []
    for _ in range(3):
        measured = engine.bench(full, WORKLOAD, max_seconds=options.seconds)
        ours.append((measured.ttft_ms, measured.tpot_ms))
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        theirs.append(json.loads(done.stdout.splitlines()[-1]))
    (our_ttft, our_tpot), (ttft, tpot) = np.median(ours, axis=0), np.median(theirs, axis=0)
    tokens = WORKLOAD.prompt_tokens
    print(f"ours: prefill {tokens / our_ttft * 1e3:.0f} tok/s, decode {1e3 / our_tpot:.0f} tok/s")
    print(f"llama.cpp Q8_0: prefill {tokens / ttft * 1e3:.0f} tok/s, decode {1e3 / tpot:.0f} tok/s")
    yield Figure("decode against llama.cpp Q8_0", float(tpot / our_tpot), 1.2, False)
    yield Figure("prefill against llama.cpp Q8_0", float(ttft / our_ttft), 1.0, False)


if __name__ == "__main__":
    sys.exit(main())
