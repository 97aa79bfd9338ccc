"""Our scorer beside lm-eval's own model (HFLM), on the starter: speed, exactness, memory, racing, accuracy.

    python benchmarks/evaluation.py              everything but accuracy
    python benchmarks/evaluation.py accuracy     accuracy of the unpruned starter on the five tasks, by both

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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import evaluation_exact as exact
import evaluation_race
import evaluation_units as units
from evaluation_report import SPEED_BOUNDS, report

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "build" / "bench-evaluation.json"
BATCH_SIZES = (1, 4, 8, 16, 32)
Unit = tuple[str, Callable[[], dict[str, Any]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("main", "accuracy"), default="main")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished units are kept")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop before a unit after so long")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--items", type=int, default=500, help="items of arc_easy and winogrande")
    parser.add_argument("--only", default="", help="comma list of unit name prefixes; then no report")
    options = parser.parse_args()
    if not DATA.is_dir():
        print(f"no data sets at {DATA}: nothing to measure")
        return 0
    book = _Book(options.results, options.fresh, options.minutes)
    bench = units.Bench(DATA, options.items)
    plan = _main_plan(bench, book, options.repeats) if options.part == "main" else _accuracy_plan(bench)
    wanted = tuple(filter(None, options.only.split(",")))
    for name, run in plan:
        if (not wanted or name.startswith(wanted)) and not book.do(name, run):
            print(f"out of time before {name}: run again to go on")
            return 3
    return 0 if wanted else report(book.units, options.part)


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
        told = {key: value for key, value in self.units[name].items() if not isinstance(value, list)}
        print(f"{name}: {time.perf_counter() - started:.1f} s {json.dumps(told)[:200]}", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(self.units), encoding="utf-8")
        scratch.replace(self.path)
        return True


def _main_plan(bench: units.Bench, book: _Book, repeats: int) -> Iterator[Unit]:
    """All units in order; the order of the two scorers alternates from one repeat to the next."""
    for task in SPEED_BOUNDS:
        for size in BATCH_SIZES:
            yield f"batch/{task}/{size}", partial(bench.hflm, task, "bf16", size, slice_items=True)
    yield "peak", bench.peak
    for repeat in range(repeats):
        for task in SPEED_BOUNDS:
            size = _best_batch(book, task)
            runs: list[Unit] = [
                (f"speed/{task}/hflm/{repeat}", partial(bench.hflm, task, "bf16", size)),
                (f"speed/{task}/ours/{repeat}", partial(bench.ours, task)),
            ]
            yield from runs if repeat % 2 == 0 else reversed(runs)
    for task in ("arc_easy", "winogrande"):
        yield f"breakdown/{task}", partial(bench.breakdown, task)
    for repeat in range(repeats):
        for share in (0.25, 0.5, 1.0):
            yield f"linear/{share}/{repeat}", partial(bench.ours, "arc_easy", share)
        yield f"half/{repeat}", bench.half_flops
    for who in ("hflm", "ours"):
        yield f"memory/{who}", partial(bench.memory, who, _best_batch(book, "mmlu"))
    for task in SPEED_BOUNDS:
        for scorer in exact.SCORERS:
            yield f"exact/{scorer}/{task}", partial(exact.loglikelihoods, bench, scorer, task)
        theirs, ours = (book.units.get(f"exact/{scorer}/{task}") for scorer in exact.SCORERS)
        if theirs and ours:
            yield f"exact/compared/{task}", partial(exact.compare, bench, task, theirs, ours)
    yield "race", partial(evaluation_race.race, bench)


def _accuracy_plan(bench: units.Bench) -> Iterator[Unit]:
    for task in exact.LIMITS:
        for scorer in exact.SCORERS:
            yield f"accuracy/{scorer}/{task}", partial(exact.accuracy, bench, scorer, task)


def _best_batch(book: _Book, task: str) -> int:
    units_by_size = {size: book.units.get(f"batch/{task}/{size}") for size in BATCH_SIZES}
    times = {size: unit["seconds"] for size, unit in units_by_size.items() if unit is not None}
    return min(times, key=times.__getitem__) if times else 8


if __name__ == "__main__":
    sys.exit(main())
