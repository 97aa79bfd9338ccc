"""Sub-networks with layers of 8 or 4 bits, beside those of 8 bits alone and the unpruned model in INT4.

Two searches of the starter's super-network, one with layers of 8 bits, one with 8 or 4 each, and the unpruned
model in INT8 and INT4, all scored with weights rounded as a package holds them. Prints, for several budgets
of bytes, the best of each on the items that were searched on and, chosen there, on items that were not;
then one line of JSON. Exits 1 if at the unpruned INT4 model's bytes the mixed ones are not the best.
Everything evaluated stays in a ledger: a run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console
from rich.table import Table
from search import FOLDER
from search_objective import Bench, open_bench, prepare
from verdict import Bound, conclude

from compressor.compute import fastest_cpu_dtype
from compressor.engines.rounding import RoundedWeights
from compressor.evaluation.agreement import torch_predict
from compressor.search.algorithms import make_search
from compressor.search.problem import Outcome
from compressor.space import SubNetwork, weight_bytes
from compressor.supernet.folder import load_supernet

BITS = {"8 bits": (8,), "8 or 4 bits": (8, 4)}
STEPS = 6  # of the byte budgets between the smallest and the unpruned INT8 model


@dataclass(frozen=True)
class Entry:
    """A sub-network with its bytes and its agreement where it was searched for."""

    subnet: SubNetwork
    bytes: float
    found: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, default=FOLDER, help="folder with a super-network; made if absent"
    )
    parser.add_argument("--evaluations", type=int, default=200, help="of each search")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare(options.run, "starter", 16, 128)
    whole = _unpruned(options.run)
    benches = {name: open_bench(options.run, 1.0, bits) for name, bits in BITS.items()}
    found = {name: _search(bench, options.evaluations, options.seed) for name, bench in benches.items()}
    return _report(benches, found, whole)


def _search(bench: Bench, evaluations: int, seed: int) -> list[Entry]:
    search = make_search("linas", bench.problem, seed)
    told: list[Outcome] = []
    while len(told) < evaluations and (asked := search.ask(1)):
        told.append(bench.evaluate(asked[0])[0])
        search.tell(told[-1:])
    return [Entry(o.subnet, o.values["weight_bytes"], o.values["accuracy"]) for o in told]


def _unpruned(folder: Path) -> dict[str, tuple[float, float, float]]:
    """Bytes and agreement of the whole model on both splits, in INT8 and INT4."""
    bench, figures = open_bench(folder, 1.0), {}
    for name, bits in (("INT8", 8), ("INT4", 4)):
        model, _, _ = load_supernet(folder / "supernet", fastest_cpu_dtype())
        RoundedWeights(model, (bits,), (bits,))
        size = float(weight_bytes(bench.elastic.shape, bench.problem.space.full, name.lower()))
        scores = [bench.text.score(torch_predict(model), split).value for split in ("search", "report")]
        figures[name] = (size, scores[0], scores[1])
    return figures


def _report(
    benches: dict[str, Bench], found: dict[str, list[Entry]], whole: dict[str, tuple[float, float, float]]
) -> int:
    int4, int8 = whole["INT4"], whole["INT8"]
    smallest = min(entry.bytes for entries in found.values() for entry in entries)
    budgets = sorted({*np.linspace(smallest, int8[0], STEPS), int4[0]})
    table = Table(
        "bytes at most", *(f"{name}: searched, unseen" for name in found), "unpruned: searched, unseen"
    )
    held: dict[tuple[str, float], float] = {}
    for budget in budgets:
        cells = []
        for name, entries in found.items():
            fitting = [entry for entry in entries if entry.bytes <= budget]
            if not fitting:
                cells.append("-")
                continue
            best = max(fitting, key=lambda entry: entry.found)
            held[name, budget] = _unseen(benches[name], best.subnet)
            shape = f"{best.subnet.depth} layers, {np.mean(best.subnet.bits):.1f} bits"
            cells.append(f"{best.found:.3f}, {held[name, budget]:.3f} ({shape})")
        fits = [(label, w) for label, w in whole.items() if w[0] <= budget]
        cells.append("; ".join(f"{label} {w[1]:.3f}, {w[2]:.3f}" for label, w in fits) or "-")
        table.add_row(f"{budget / 1e6:.1f} MB", *cells)
    Console(width=150).print(table)
    mixed, alone = (held.get((name, int4[0]), 0.0) for name in ("8 or 4 bits", "8 bits"))
    bounds = [
        Bound("mixed less 8 bits alone, unseen, at INT4's bytes", mixed - alone, 0, at_most=False),
        Bound("mixed less unpruned INT4, unseen, at its bytes", mixed - int4[2], 0, at_most=False),
    ]
    return conclude(bounds, {"unpruned": whole, "evaluations": {name: len(e) for name, e in found.items()}})


def _unseen(bench: Bench, subnet: SubNetwork) -> float:
    with bench.elastic.activated(subnet) as model:
        return float(bench.text.score(torch_predict(model), "report").value)


if __name__ == "__main__":
    sys.exit(main())
