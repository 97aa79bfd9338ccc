"""Our scorer beside lm-eval's own model (HFLM), on the starter, in one run: speed, exactness, memory.

Prints a table, then one line of JSON with figures and bounds; exits 1 if a figure falls short. Every
finished unit is kept in --results, so a run that was stopped (or ran out of --minutes: exit 3) goes
on where it stopped. Needs ../shared/data; says so and exits 0 without it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import evaluation_units as units

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "build" / "bench-evaluation.json"

SPEED_BOUNDS = {"arc_easy": 6.0, "winogrande": 6.0, "mmlu": 8.0}
BUSY = 0.05
"""Share of the machine taken by others from which processor times are compared instead of wall times."""
BATCH_SIZES = (1, 4, 16, 32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished units are kept")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop before a unit after so long")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--items", type=int, default=500, help="items of arc_easy and winogrande")
    parser.add_argument("--only", default="", help="comma list of unit name prefixes")
    options = parser.parse_args()
    if not DATA.is_dir():
        print(f"no data sets at {DATA}: nothing to measure")
        return 0
    book = _Book(options.results, options.fresh, options.minutes)
    bench = units.Bench(DATA, options.items)
    wanted = tuple(filter(None, options.only.split(",")))
    for name, run in _plan(bench, book, options.repeats):
        if (not wanted or name.startswith(wanted)) and not book.do(name, run):
            print(f"out of time before {name}: run again to go on")
            return 3
    return _report(book.units)


class _Book:
    """Finished units by name, saved after each one."""

    def __init__(self, path: Path, fresh: bool, minutes: float) -> None:
        self.path = path
        self.units: dict[str, dict[str, Any]] = {}
        self.deadline = time.monotonic() + minutes * 60
        if path.is_file() and not fresh:
            self.units = json.loads(path.read_text(encoding="utf-8"))

    def do(self, name: str, run: Callable[[], dict[str, Any]]) -> bool:
        """Run a unit unless it is done; False when there is no time left."""
        if name in self.units:
            return True
        if time.monotonic() > self.deadline:
            return False
        started = time.perf_counter()
        self.units[name] = run()
        print(
            f"{name}: {time.perf_counter() - started:.1f} s {json.dumps(self.units[name])[:200]}", flush=True
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(self.units, indent=1), encoding="utf-8")
        scratch.replace(self.path)
        return True


def _plan(bench: units.Bench, book: _Book, repeats: int) -> Any:
    """All units in order; the order of the two scorers alternates from one repeat to the next."""
    for task in SPEED_BOUNDS:
        for size in BATCH_SIZES:
            yield f"batch/{task}/{size}", lambda t=task, s=size: bench.hflm(t, "bf16", s, slice_items=True)
    for repeat in range(repeats):
        for task in SPEED_BOUNDS:
            size = _best_batch(book, task)
            runs = [
                (f"speed/{task}/hflm/{repeat}", lambda t=task, s=size: bench.hflm(t, "bf16", s)),
                (f"speed/{task}/ours/{repeat}", lambda t=task: bench.ours(t, "bf16")),
            ]
            yield from runs if repeat % 2 == 0 else reversed(runs)
    yield "peak", bench.peak
    yield "breakdown", bench.breakdown
    yield "race", bench.race
    for share in (0.25, 0.5, 1.0):
        for repeat in range(repeats):
            yield f"linear/{share}/{repeat}", lambda s=share: bench.ours("arc_easy", "bf16", share=s)
    for repeat in range(repeats):
        yield f"half/{repeat}", bench.half_flops
    for task in SPEED_BOUNDS:
        yield f"exact/{task}", lambda t=task: bench.exactness(t)
    for who in ("hflm", "ours"):
        yield f"memory/{who}", lambda w=who: bench.memory(w, _best_batch(book, "mmlu"))
    for task in units.ACCURACY_TASKS:
        yield f"accuracy/{task}", lambda t=task: bench.accuracy(t)


def _best_batch(book: _Book, task: str) -> int:
    units_by_size = {size: book.units.get(f"batch/{task}/{size}") for size in BATCH_SIZES}
    times = {size: unit["cpu_seconds"] for size, unit in units_by_size.items() if unit is not None}
    return min(times, key=times.__getitem__) if times else 4


def _report(done: dict[str, dict[str, Any]]) -> int:
    checks: list[tuple[str, float, str, float]] = []
    print(
        f"\n{'':12}{'HFLM s':>10}{'batch':>7}{'ours s':>10}{'faster':>9}{'bound':>7}   tokens, others' load"
    )
    for task, bound in SPEED_BOUNDS.items():
        theirs, ours = (_wall(done, f"speed/{task}/{who}/") for who in ("hflm", "ours"))
        if not theirs or not ours:
            continue
        by_wall = theirs / ours
        by_cpu = _cpu(done, f"speed/{task}/hflm/") / _cpu(done, f"speed/{task}/ours/")
        load = _median([unit["others"] for unit in _units(done, f"speed/{task}/")])
        batch = done[f"speed/{task}/hflm/0"]["batch"]
        tokens = done[f"speed/{task}/ours/0"]
        print(
            f"{task:12}{theirs:10.2f}{batch:7d}{ours:10.2f}{by_wall:8.2f}×{by_cpu:9.2f}×{bound:6.0f}×   "
            f"{tokens['tokens']:,} of {tokens['raw_tokens']:,}; {load:.0%}"
        )
        checks.append((f"speedup_{task}", by_cpu if load > BUSY else by_wall, ">=", bound))
    checks += _exactness_checks(done) + _cost_checks(done)
    _print_accuracy(done)
    failed = [
        name for name, value, sign, bound in checks if (value < bound) == (sign == ">=") and value != bound
    ]
    print(f"\n{'figure':28}{'value':>12}{'bound':>12}")
    for name, value, sign, bound in checks:
        print(f"{name:28}{value:12.4g}{sign:>5}{bound:7.4g}{'  MISSED' if name in failed else ''}")
    for name in ("peak", "breakdown", "race"):
        print(f"{name}: {json.dumps(done.get(name, {}))}")
    figures = {name: {"value": value, "bound": f"{sign}{bound}"} for name, value, sign, bound in checks}
    print(
        json.dumps({"figures": figures, "missed": failed, "peak": done.get("peak"), "race": done.get("race")})
    )
    return 1 if failed else 0


def _exactness_checks(done: dict[str, dict[str, Any]]) -> list[tuple[str, float, str, float]]:
    checks = []
    for task in SPEED_BOUNDS:
        if unit := done.get(f"exact/{task}"):
            checks.append((f"fp32_max_difference_{task}", unit["max_difference"], "<=", 1e-3))
            checks.append((f"fp32_other_answers_{task}", unit["other_answers"], "<=", 0))
    return checks


def _cost_checks(done: dict[str, dict[str, Any]]) -> list[tuple[str, float, str, float]]:
    checks = []
    if "memory/hflm" in done and "memory/ours" in done:
        ratio = done["memory/ours"]["peak_bytes"] / done["memory/hflm"]["peak_bytes"]
        checks.append(("memory_of_hflm", ratio, "<=", 1.0))
    whole = _cpu(done, "linear/1.0/")
    if whole and (quarter := _cpu(done, "linear/0.25/")):
        checks.append(("time_4x_items", whole / quarter, "<=", 4.4))
    if whole and (half := _cpu(done, "half/")):
        checks.append(("time_half_flops", half / whole, "<=", 0.65))
    return checks


def _print_accuracy(done: dict[str, dict[str, Any]]) -> None:
    rows = {name: done[f"accuracy/{name}"] for name in units.ACCURACY_TASKS if f"accuracy/{name}" in done}
    if rows:
        print(f"\n{'unpruned starter, fp32':28}{'items':>7}{'HFLM':>9}{'ours':>9}{'95% interval':>20}")
    for name, row in rows.items():
        span = f"{row['low']:.4f} to {row['high']:.4f}"
        print(f"{name:28}{row['items']:7d}{row['hflm']:9.4f}{row['ours']:9.4f}{span:>20}")


def _wall(done: dict[str, dict[str, Any]], prefix: str) -> float:
    """Median wall time of a unit's repeats, s; 0 before the first."""
    return _median([unit["seconds"] for unit in _units(done, prefix)])


def _cpu(done: dict[str, dict[str, Any]], prefix: str) -> float:
    """Median processor time, s: what to compare on a machine that others use too."""
    return _median([unit["cpu_seconds"] for unit in _units(done, prefix)])


def _units(done: dict[str, dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    return [unit for name, unit in done.items() if name.startswith(prefix)]


def _median(values: list[float]) -> float:
    ordered = sorted(values) or [0.0]
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


if __name__ == "__main__":
    sys.exit(main())
