"""The wizard in a terminal: start to first screen, and key press to screen while a real search runs.

A small run of the starter is made once and kept; a copy of it then searches on, on all cores, as the run of
another wizard would, while every step is opened and used by keys. Prints a table, then one JSON line; exit 1
if a bound is missed.

    python benchmarks/wizard.py [--folder runs/bench-wizard] [--sessions 3]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from verdict import Bound, conclude
from wizard_terminal import Terminal

from compressor.request import stored_request
from compressor.runfolder import RunFolder
from tui.background import BackgroundRun
from tui.choices import of_request

START_BOUND_S, KEY_BOUND_MS = 1.5, 100.0
STARTS = 5
EFFORT = (
    *("--tuning-steps", "4", "--text-sequences", "24", "--score-sequences", "8", "--sequence-length", "64"),
    *("--evaluations", "8"),
    *("--model", "starter", "--profile", "starter-cpu", "--preset", "quick"),
)
Press = tuple[str, str, tuple[str, ...]]
BEFORE: tuple[Press, ...] = (
    ("profile: next", "down", ("laptop-cpu",)),
    ("profile: back", "up", ("starter-cpu",)),
    ("help", "f1", ("Where will the model run",)),
    ("help: close", "escape", ("Limits, and what",)),
    ("commands", "ctrl+p", ("Search for",)),
    ("commands: close", "escape", ("Limits, and what",)),
    ("to Model", "ctrl+n", ("Training data", "Next ›")),
    ("to Plan", "ctrl+n", ("What will happen", "--resume")),
    ("back to Model", "escape", ("Training data", "Next ›")),
    ("back to Device", "escape", ("Limits, and what", "Next ›")),
)
FINISHED: tuple[Press, ...] = (
    ("front: next", "down", ("±",)),
    ("front: back", "up", ("±",)),
    ("front: sort", "o", ("by weights",)),
    ("chart: speed", "v", ("over tokens/s",)),
    ("chart: size", "v", ("over MiB",)),
    ("to Package", "ctrl+n", ("Hugging Face", "Serve ›")),
    ("back to Choose", "escape", ("Budgets", "over MiB")),
    ("back to Run", "escape", ("Best so far", "Choose ›")),
    ("to Choose", "ctrl+n", ("Budgets", "over MiB")),
    ("layers", "2", ("layers, MLPs",)),
    ("compare", "3", ("this one",)),
    ("chart", "1", ("over MiB",)),
)
AT_WORK: tuple[Press, ...] = (
    ("run chart: speed", "v", ("over tokens/s",)),
    ("run chart: size", "v", ("over MiB",)),
    ("run help", "f1", ("Every dot",)),
    ("run help: close", "escape", ("Best so far",)),
    ("run: back to Plan", "escape", ("What will happen", "--resume")),
    ("run: back to Model", "escape", ("Training data", "Next ›")),
)
SORTED = ("by weights", "by first token", "by each token", "by speed", "by accuracy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-wizard"))
    parser.add_argument("--sessions", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    if not (done / "front.json").is_file():
        print("making a small run of the starter ...", flush=True)
        made = [sys.executable, "-P", "-m", "compressor.cli", *EFFORT, "--run", str(done), "--resume"]
        subprocess.run(made, cwd=folder, stdout=subprocess.DEVNULL, check=False)
    starts = [_start(folder) for _ in range(STARTS)]
    with searching(done, folder / "at-work") as evaluations:
        loaded = [_start(folder) for _ in range(options.sessions)]
        first = evaluations()
        presses: dict[str, list[float]] = defaultdict(list)
        for _ in range(options.sessions):
            for run, ready, keys in (
                ([], "whole: INT8", BEFORE),
                ([str(done)], "over MiB", FINISHED),
                ([str(folder / "at-work")], "over MiB", AT_WORK),
            ):
                _session(folder, run, ready, keys, presses)
        evaluated = evaluations() - first
    return _verdict(starts, loaded, presses, evaluated)


@contextmanager
def searching(done: Path, run: Path) -> Iterator[Callable[[], int]]:
    """A copy of the run, searching on as the wizard starts it. Gives how many sub-networks it evaluated."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(done, run)
    (run / "events.jsonl").unlink()

    def evaluations() -> int:
        events = run / "events.jsonl"
        text = events.read_text(errors="replace") if events.exists() else ""
        return text.count('"CandidateEvaluated"')

    asked = of_request(stored_request(RunFolder(run)), run).but(evaluations=400)
    search = BackgroundRun.start(asked)
    try:
        end = time.monotonic() + 600
        while evaluations() < 10 and search.alive and time.monotonic() < end:
            time.sleep(0.5)
        if evaluations() < 10:
            raise SystemExit(f"no search came to run: {search.ending().complaint}")
        yield evaluations
        if not search.alive:
            raise SystemExit("the search ended before the wizard was measured")
    finally:
        search.stop()
        while search.alive:
            time.sleep(0.2)


def _wizard(folder: Path, run: list[str], size: tuple[int, int] = (80, 24)) -> Terminal:
    return Terminal([sys.executable, "-P", "-m", "tui", *run], folder, *size)


def _start(folder: Path) -> float:
    """Seconds from the command to the first screen with its keys."""
    with _wizard(folder, []) as terminal:
        return terminal.shown(("1 Device", "Next ›", "Commands"))


def _session(
    folder: Path, run: list[str], ready: str, keys: tuple[Press, ...], presses: dict[str, list[float]]
) -> None:
    """Open a wizard, let it get ready, and go through the keys twice."""
    with _wizard(folder, run) as terminal:
        terminal.shown((ready,), 60)
        terminal.rest(1.0, 6.0)
        sorts = iter(SORTED)
        for name, key, texts in [*keys, *(keys if keys is not AT_WORK else ())]:
            texts = (next(sorts),) if key == "o" else texts
            presses[name].append(terminal.press(key, texts))
            terminal.rest(0.3, 1.0)


def _verdict(
    starts: list[float], loaded: list[float], presses: dict[str, list[float]], evaluated: int
) -> int:
    print(f"{'key press to screen, ms':28s} {'presses':>7s} {'median':>7s} {'worst':>7s}")
    for name, found in presses.items():
        print(f"{name:28s} {len(found):7d} {statistics.median(found):7.0f} {max(found):7.0f}")
    every = sorted(ms for found in presses.values() for ms in found)
    tail = every[min(len(every) - 1, int(0.95 * len(every)))]
    slowest = max(presses, key=lambda name: statistics.median(presses[name]))
    slow = statistics.median(presses[slowest])
    print(f"all {len(every)} presses: median {statistics.median(every):.0f}, 95th percentile {tail:.0f} ms")
    print(f"start to first screen: median {statistics.median(starts):.2f} s, worst {max(starts):.2f} s;")
    print(
        f"  while the search runs: worst {max(loaded):.2f} s. The search evaluated {evaluated} sub-networks."
    )
    bounds = [
        Bound("start_s", statistics.median(starts), START_BOUND_S),
        Bound("key_p95_ms", tail, KEY_BOUND_MS),
        Bound("slowest_key_median_ms", slow, KEY_BOUND_MS),
        Bound("key_worst_ms", every[-1], KEY_BOUND_MS),
        Bound("evaluated_meanwhile", evaluated, 1, at_most=False),
    ]
    figures = {
        "key_median_ms": round(statistics.median(every), 1),
        "slowest_key": slowest,
        "presses": len(every),
        "start_worst_s": round(max(starts), 3),
        "start_under_load_s": round(max(loaded), 3),
    }
    return conclude(bounds, figures)


if __name__ == "__main__":
    sys.exit(main())
