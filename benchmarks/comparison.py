"""The starter's sub-networks beside LLM-Pruner and SliceGPT: the same sizes, as many steps of tuning.

One run of `compress` in 8 bits, then for each size what `compress compare` does: the run's most accurate
sub-network of at most that share of the parameters, and the unpruned model pruned to its size by each of the
two, tuned in as many steps on the same text. Prints a table a size, then one line of JSON; exits 1 if a rival
agrees more with the unpruned model. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pydantic import TypeAdapter
from rich.console import Console
from verdict import Bound, conclude

from compressor import models
from compressor.console import terminal_listener
from compressor.pipeline.comparing import METHODS, OURS, compare
from compressor.pipeline.run import write_report
from compressor.report.comparison import comparison_table
from compressor.report.data import Comparison
from compressor.space import SearchSpace, SubNetwork, parameter_count

SHARES = (0.9, 0.8)
"""Of the unpruned model's parameters."""
PROFILE = """
name = "bench-comparison"
summary = "Two cores, 8 bits throughout: what pruning alone does"
engine = "onnxruntime"
[device]
kind = "cpu"
memory_gib = 4
[budgets]
memory_gib = 0.1955
ttft_ms = 5000
tpot_ms = 200
[workload]
prompt_tokens = 128
output_tokens = 64
[space]
depth_fractions = [0.7, 0.767, 0.8, 0.833, 0.867, 0.9, 0.933, 1.0]
width_fractions = [0.5, 0.75, 1.0]
"""
"""Its memory budget lets sub-networks of nine tenths of the parameters pass."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/bench-comparison"))
    parser.add_argument(
        "--steps", type=int, default=160, help="of each tuning, four texts of 160 tokens each"
    )
    parser.add_argument("--evaluations", type=int, default=40)
    options = parser.parse_args()
    _compress(options.run, options.steps, options.evaluations)
    console = Console()
    compared = []
    for share in SHARES:
        pick = _most_accurate(options.run, share)
        with terminal_listener(console) as listener:
            compared.append(compare(options.run, pick.digest, None, listener))
        console.print(comparison_table(compared[-1]))
    return _conclude(compared)


def _compress(run: Path, steps: int, evaluations: int) -> None:
    profile = run.with_name(f"{run.name}.toml")
    profile.parent.mkdir(parents=True, exist_ok=True)
    profile.write_text(PROFILE, encoding="utf-8")
    effort = {"tuning-steps": steps, "tuning-minutes": 600, "winner-minutes": 600, "evaluations": evaluations}
    flags = [word for name, value in effort.items() for word in (f"--{name}", str(value))]
    asked = ["--model", "starter", "--profile", str(profile), "--preset", "quick", "--run", str(run)]
    command = [sys.executable, "-m", "compressor.cli", *asked, *flags, "--resume"]
    subprocess.run(command, check=True)


def _most_accurate(run: Path, share: float) -> SubNetwork:
    """Of the run's sub-networks with at most that share of the parameters, by the items it searched on."""
    shape = models.read_shape(models.resolve("starter"))
    most = share * parameter_count(shape, SearchSpace.from_fractions(shape, (1.0,), (1.0,)).full)
    able = [
        (candidate.accuracy.value, candidate.subnet)
        for candidate in write_report(run).data.candidates
        if candidate.accuracy and parameter_count(shape, candidate.subnet) <= most
    ]
    return max(able, key=lambda pair: pair[0])[1]


def _conclude(compared: list[Comparison]) -> int:
    bounds = []
    for share, comparison in zip(SHARES, compared, strict=True):
        values = {each.name: each.score.value for each in comparison.compared}
        bounds += [
            Bound(f"over {name} at {share:g}", values[OURS] - values[name], 0.0, at_most=False)
            for name in METHODS
        ]
    figures = {"compared": TypeAdapter(list[Comparison]).dump_python(compared, mode="json")}
    return conclude(bounds, figures)


if __name__ == "__main__":
    sys.exit(main())
