"""Searches compared on real evaluations of the starter: hypervolume for the evaluations spent.

Hypervolume is given as the mean, over all byte budgets between the smallest sub-network and the bench's
own, of the best agreement found within each. Everything evaluated stays in one ledger, so a run
that was stopped (or ran out of --minutes: exit 3) goes on where it stopped. Prints a table, then one line of
JSON, and exits 1 if a bound is missed; --plot draws the curves with their bands.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_rel
from search_objective import Bench, open_bench, prepare
from verdict import Bound, conclude

from compressor.search.algorithms import make_search
from compressor.search.front import hypervolume
from compressor.search.problem import Outcome
from compressor.space import SubNetwork

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "bench-search"
OURS, PUBLISHED = "linas", "published"
ALGORITHMS = (OURS, PUBLISHED, "nsga2", "random")
MAX_OVERHEAD = 0.05


def main() -> int:
    options = _options()
    prepare(options.run, options.model, options.sequences, options.length)
    bench = open_bench(options.run, options.budget)
    deadline = time.monotonic() + 60 * options.minutes
    checkpoints = sorted({*range(50, options.evaluations, 50), options.evaluations})
    algorithms = options.algorithms.split(",")
    for seed in range(options.seeds):
        for checkpoint in checkpoints:
            for algorithm in algorithms:
                run(bench, algorithm, seed, checkpoint, deadline)
    traces = [
        run(bench, algorithm, seed, options.evaluations, 0.0)
        for algorithm in algorithms
        for seed in range(options.seeds)
    ]
    bounds = report(bench, traces, checkpoints)
    if options.plot:
        plot(traces, options.plot)
    code = conclude(bounds, {"medians": medians(traces, checkpoints)})
    if time.monotonic() > deadline:
        print("out of time: run again to go on")
        return 3
    return code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, default=FOLDER, help="folder with a super-network; made if absent"
    )
    parser.add_argument("--model", default="starter", help="what the super-network is made from, if absent")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=250)
    parser.add_argument(
        "--sequences", type=int, default=32, help="sequences scored, if the text is made here"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument(
        "--budget", type=float, default=0.95, help="bytes, as a share of the unpruned model's"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="stop before an evaluation after so long")
    parser.add_argument("--plot", type=Path, help="write the curves there (SVG or PNG)")
    return parser.parse_args()


@dataclass(frozen=True)
class Trace:
    """One algorithm with one seed: what it evaluated in order, its curve, and where the time went."""

    algorithm: str
    seed: int
    outcomes: list[Outcome]
    volumes: list[float]
    search_s: float
    evaluation_s: float
    faults: int


def run(bench: Bench, algorithm: str, seed: int, evaluations: int, deadline: float) -> Trace:
    """Go on from what this algorithm and seed evaluated earlier, to so many or to the deadline."""
    name = f"trace:{bench.text.digest}:{bench.budget_bytes:.0f}:{algorithm}:{seed}"
    stored: Any = bench.ledger.fact(name) or {"subnets": [], "search_s": 0.0}
    search = make_search(algorithm, bench.problem, seed)
    outcomes, evaluation_s = [], 0.0
    for data in stored["subnets"][:evaluations]:
        outcome, cost = bench.evaluate(SubNetwork.from_dict(data))
        outcomes.append(outcome)
        evaluation_s += cost
    search.tell(outcomes)
    while len(outcomes) < evaluations and time.monotonic() < deadline:
        began = time.perf_counter()
        asked = search.ask(1)
        stored["search_s"] += time.perf_counter() - began
        if not asked:
            break
        outcome, cost = bench.evaluate(asked[0])
        search.tell([outcome])
        outcomes.append(outcome)
        evaluation_s += cost
        stored["subnets"].append(asked[0].to_dict())
        bench.ledger.set_fact(name, stored)
    volumes = [volume(bench, outcomes[: n + 1]) for n in range(len(outcomes))]
    return Trace(
        algorithm, seed, outcomes, volumes, stored["search_s"], evaluation_s, faults(bench, outcomes)
    )


def volume(bench: Bench, outcomes: list[Outcome]) -> float:
    """Mean best agreement over byte budgets from the smallest sub-network to the bench's budget."""
    costs = np.array([bench.problem.costs(o) for o in bench.problem.comparable(outcomes)]).reshape(-1, 2)
    smallest = bench.problem.size(bench.problem.space.smallest)
    return hypervolume(costs, [0.0, bench.budget_bytes]) / (bench.budget_bytes - smallest)


def faults(bench: Bench, outcomes: list[Outcome]) -> int:
    """Evaluations over the byte budget, and evaluations of what was evaluated before."""
    over = sum(not bench.problem.allows(o.subnet) for o in outcomes)
    return over + len(outcomes) - len({o.subnet for o in outcomes})


def report(bench: Bench, traces: list[Trace], checkpoints: list[int]) -> list[Bound]:
    """Print the tables; returns the figures with their bounds."""
    console = Console()
    table = Table("", *(str(c) for c in checkpoints), "seeds", "search / evaluation s", "faults")
    names = list(dict.fromkeys(t.algorithm for t in traces))
    for name in names:
        mine = [t for t in traces if t.algorithm == name and t.outcomes]
        table.add_row(
            name,
            *(_median_at(mine, c) for c in checkpoints),
            str(len(mine)),
            f"{sum(t.search_s for t in mine):.0f} / {sum(t.evaluation_s for t in mine):.0f}",
            str(sum(t.faults for t in mine)),
        )
    console.print(
        f"mean best agreement over byte budgets (median of seeds); {len(bench.ledger.rows())} "
        f"different sub-networks evaluated on {bench.text.task_key('search')}"
    )
    console.print(table)
    return [*_reach_bounds(traces), *_paired_bounds(traces, checkpoints), *_cost_bounds(traces)]


def _reach_bounds(traces: list[Trace]) -> Iterable[Bound]:
    """How soon ours has what a rival has at the end."""
    for rival, share in (("nsga2", 125 / 250), ("random", 60 / 250)):
        ends = {t.seed: (t.volumes[-1], len(t.volumes)) for t in traces if t.algorithm == rival and t.volumes}
        if not ends:
            continue
        target = statistics.median(value for value, _ in ends.values())
        length = max(count for _, count in ends.values())
        needed = [
            next((n + 1 for n, v in enumerate(t.volumes) if v >= target), len(t.volumes) + 1)
            for t in traces
            if t.algorithm == OURS and t.volumes
        ]
        if needed:
            name = f"evaluations of {OURS} to {rival}'s {target:.4f} after {length}"
            yield Bound(name, statistics.median(needed), share * length)


def _paired_bounds(traces: list[Trace], checkpoints: list[int]) -> Iterable[Bound]:
    """One-sided paired t-tests over seeds that ours is worse than LINAS as published."""
    curves = {(t.algorithm, t.seed): t.volumes for t in traces}
    seeds = {t.seed for t in traces}
    for checkpoint in checkpoints:
        pairs = [
            (curves[OURS, s][checkpoint - 1], curves[PUBLISHED, s][checkpoint - 1])
            for s in sorted(seeds)
            if all(len(curves.get((name, s), [])) >= checkpoint for name in (OURS, PUBLISHED))
        ]
        if not pairs:
            continue
        ours, theirs = np.array(pairs).T
        name = f"p(worse than published) at {checkpoint}, gain {float(np.mean(ours - theirs)):+.4f}"
        yield Bound(f"{name}, {len(pairs)} seeds", _worse_p(ours, theirs), 0.05, at_most=False)


def _worse_p(ours: Any, theirs: Any) -> float:
    if len(ours) < 2 or np.ptp(ours - theirs) == 0:
        return 1.0 if np.mean(ours - theirs) >= 0 else 0.0
    return float(ttest_rel(ours, theirs, alternative="less").pvalue)


def _cost_bounds(traces: list[Trace]) -> Iterable[Bound]:
    ours = [t for t in traces if t.algorithm == OURS and t.outcomes]
    if ours:
        search, evaluation = sum(t.search_s for t in ours), sum(t.evaluation_s for t in ours)
        yield Bound("share of the run outside evaluations", search / (search + evaluation), MAX_OVERHEAD)
        yield Bound("evaluations over the budget or repeated", sum(t.faults for t in ours), 0)


def medians(traces: list[Trace], checkpoints: list[int]) -> dict[str, dict[int, str]]:
    """Each algorithm's median hypervolume over seeds at each checkpoint."""
    names = dict.fromkeys(t.algorithm for t in traces)
    mine = {name: [t for t in traces if t.algorithm == name] for name in names}
    return {name: {c: _median_at(found, c) for c in checkpoints} for name, found in mine.items()}


def _median_at(traces: list[Trace], checkpoint: int) -> str:
    values = [t.volumes[checkpoint - 1] for t in traces if len(t.volumes) >= checkpoint]
    return f"{statistics.median(values):.4f}" if values else "-"


def plot(traces: list[Trace], path: Path) -> None:
    """Median over seeds with the band from worst to best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    labels = {OURS: "LINAS, ours", PUBLISHED: "LINAS, as published", "nsga2": "NSGA-II", "random": "random"}
    for name in dict.fromkeys(t.algorithm for t in traces):
        curves = [t.volumes for t in traces if t.algorithm == name and t.volumes]
        if not curves:
            continue
        shown = min(len(c) for c in curves)
        values = np.array([c[:shown] for c in curves])
        steps = np.arange(1, shown + 1)
        (line,) = axes.plot(
            steps, np.median(values, axis=0), label=f"{labels.get(name, name)} ({len(curves)})"
        )
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="real evaluations", ylabel="mean best agreement over byte budgets")
    axes.grid(alpha=0.3)
    axes.legend(title="algorithm (seeds)", loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
