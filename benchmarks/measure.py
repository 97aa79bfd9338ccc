"""Can a figure be believed, and what does it cost? On the starter, in the engines that serve.

Prints a table, then one line of JSON with figures and bounds; exits 1 if a figure falls short. Every
finished unit is kept in --cache, so a run that was stopped goes on where it stopped. Without
../shared/data the agreement of logits is left out; without ``make setup-llama`` the comparison with
llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import rivals
from measure_units import Bench
from scipy.stats import spearmanr
from verdict import Bound, conclude

from compressor.engines.host import host_faults
from compressor.engines.speed import fit_speed
from compressor.space import SubNetwork

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
REPEATS = 5
ROUNDS = 5
Done = dict[str, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "bench-measure")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--only", default="", help="comma list of unit name prefixes")
    parser.add_argument("--pause", type=float, default=150.0, help="least seconds between the five repeats")
    parser.add_argument("--seconds", type=float, default=12.0, help="time for one measurement")
    options = parser.parse_args()
    for fault in host_faults():
        print(f"not fit to measure on: {fault}")
    kept = options.cache / "units.json"
    done: Done = {}
    if kept.is_file() and not options.fresh:
        done = json.loads(kept.read_text(encoding="utf-8"))
    bench = Bench(options.cache, DATA, options.seconds)
    wanted = tuple(filter(None, options.only.split(",")))
    for name, run in _units(bench):
        if name in done or (wanted and not name.startswith(wanted)):
            continue
        if name.startswith("repeat"):
            _wait(done, options.pause)
        began = time.perf_counter()
        done[name] = run()
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        kept.write_text(json.dumps(done, indent=1), encoding="utf-8")
    return _report(done)


def _units(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "building", bench.building
    for repeat in range(REPEATS):
        yield f"repeat/{repeat}", bench.repeat
    yield "panel", bench.panel
    if DATA.is_dir():
        yield "logits", bench.logits
    if (rivals.LLAMA / "python").is_file():
        for turn in range(ROUNDS):
            yield f"llama/{turn}", bench.llama


def _wait(done: Done, pause: float) -> None:
    """Until ``pause`` seconds after the latest repeat."""
    latest = max((unit["taken_at"] for name, unit in done.items() if name.startswith("repeat")), default=0.0)
    time.sleep(max(0.0, min(pause, latest + pause - time.time())))


def _report(done: Done) -> int:
    figures = [figure for part in (_building, _repeats, _panel, _logits, _llama) for figure in part(done)]
    return conclude(figures)


def _building(done: Done) -> Iterator[Bound]:
    if unit := done.get("building"):
        yield Bound("build and load a candidate in onnxruntime, s", max(unit["seconds"]), 1.0)
        yield Bound("bytes of the largest candidate", unit["bytes"], 200_000)


def _repeats(done: Done) -> Iterator[Bound]:
    units = [unit for name, unit in done.items() if name.startswith("repeat")]
    if len(units) < REPEATS:
        return
    minutes = (units[-1]["taken_at"] - units[0]["taken_at"]) / 60
    print(f"{len(units)} repeats over {minutes:.1f} minutes")
    for name in ("ttft", "tpot"):
        ratios = [unit[f"{name}_ratio"] for unit in units]
        absolute = [unit[f"{name}_ms"] for unit in units]
        print(f"{name}: ratios {[round(r, 3) for r in ratios]}, ms {[round(a, 2) for a in absolute]}")
        yield Bound(f"{name} ratio of five repeats, max/min", max(ratios) / min(ratios), 1.05)


def _panel(done: Done) -> Iterator[Bound]:
    if "panel" not in done:
        return
    known, taken = done["panel"]["known"], done["panel"]["taken"]
    for name in ("ttft", "tpot"):
        ratios = [one[f"{name}_ratio"] for one in taken]
        correlation = float(spearmanr([one["flops"] for one in taken], ratios)[0])
        yield Bound(f"rank correlation of {name} with FLOPs", correlation, 0.95, at_most=False)
    # On a machine that others use, what counts is the time beside the reference's at that moment.
    scale = {n: float(np.median([one[f"reference_{n}_ms"] for one in taken])) for n in ("ttft", "tpot")}
    times = {n: [one[f"{n}_ratio"] * scale[n] for one in taken] for n in scale}
    subnets = [SubNetwork.from_dict(one["subnet"]) for one in taken]
    model = fit_speed(subnets[:known], times["ttft"][:known], times["tpot"][:known])
    assert model is not None
    estimates = [model.predict(subnet) for subnet in subnets[known:]]
    for name in scale:
        pairs = zip(estimates, times[name][known:], strict=True)
        errors = [abs(getattr(estimate, f"{name}_ms") / real - 1) for estimate, real in pairs]
        print(
            f"predictor of {name}: {known} known, largest error {max(errors):.3f}, stated {model.error:.3f}"
        )
        yield Bound(
            f"predictor's error on held-out {name}, 90th percentile", float(np.quantile(errors, 0.9)), 0.07
        )


def _logits(done: Done) -> Iterator[Bound]:
    if "logits" not in done:
        return
    found = done["logits"]["found"]
    for one in found:
        print(
            f"{one['layers']} layers, mean width {one['mean_width']:.0f}, bits {one['bits']}: fp32 graph "
            f"{one['fp32_gap']:.1e}, INT8 KL {one['int8_kl']:.4f}, token by token {one['decoded_kl']:.4f}"
        )
    yield Bound("fp32 graph's largest gap of logits", max(one["fp32_gap"] for one in found), 1e-3)
    for name, what in (("int8_kl", "read at once"), ("decoded_kl", "token by token")):
        worst = max(one[name] for one in found)
        yield Bound(f"INT8 KL on 500 tokens, {what}, nats, worst candidate", worst, 0.02)


def _llama(done: Done) -> Iterator[Bound]:
    units = [unit for name, unit in done.items() if name.startswith("llama")]
    if not units:
        return
    ours, theirs = (np.array([unit[who] for unit in units]) for who in ("ours", "theirs"))
    ratios = np.median(theirs / ours, axis=0)  # of pairs that were measured one after the other
    for row, tokens in enumerate((128, 512)):
        for who, figures in (("ours", ours), ("llama.cpp Q8_0", theirs)):
            ttft, tpot = np.median(figures, axis=0)[row]
            print(f"{who}, prompt {tokens}: prefill {1e3 * tokens / ttft:.0f} tok/s, decode {1e3 / tpot:.0f}")
        prefill, decode = ratios[row]
        yield Bound(f"decode against llama.cpp Q8_0, prompt {tokens}", decode, 1.2, False)
        yield Bound(f"prefill against llama.cpp Q8_0, prompt {tokens}", prefill, 1.0, False)


if __name__ == "__main__":
    sys.exit(main())
