"""Builds and measures sub-networks of the starter in vLLM: none may take more than 6 s to build and load.

Weights are made up, all in one process of vLLM's environment (`make setup-vllm`), each from the largest to
the smallest. Prints a table, then one line of JSON with the bound; exits 1 if it is missed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from verdict import Bound, conclude

from compressor.engines.vllm import VllmEngine
from compressor.profile import Workload
from compressor.space import SearchSpace, SubNetwork

ROOT = Path(__file__).resolve().parents[1]
WORKLOAD = Workload(prompt_tokens=128, output_tokens=32)
DEPTHS, WIDTHS = (0.7, 0.85, 1.0), (0.5, 0.75, 1.0)
DRAWN = 3
BOUND_S = 6.0


def main() -> int:
    if len(sys.argv) > 1:
        return _measure(Path(sys.argv[1]))
    import rivals

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder = rivals.model_folder(ROOT / "build" / "bench-measure")
    command = [str(rivals.VLLM / "python"), str(Path(__file__).resolve()), str(folder)]
    return subprocess.run(command, env=environment).returncode


def _measure(folder: Path) -> int:
    engine = VllmEngine(folder)
    began = time.perf_counter()
    subnets = _subnets(folder)
    engine.build(subnets[0], WORKLOAD).close()
    print(f"first of the process, with vLLM's imports: {time.perf_counter() - began:.1f} s")
    print("  layers  mean width  build s  TTFT ms  TPOT ms  tokens/s")
    rows = []
    for subnet in subnets:
        began = time.perf_counter()
        candidate = engine.build(subnet, WORKLOAD)
        seconds = time.perf_counter() - began
        taken = engine.bench(candidate, WORKLOAD, max_seconds=3.0)
        candidate.close()
        width = sum(subnet.widths) / subnet.depth
        print(
            f"{subnet.depth:8d}{width:12.0f}{seconds:9.2f}{taken.ttft_ms:9.1f}{taken.tpot_ms:9.2f}"
            f"{taken.throughput_tok_s:10.1f}",
            flush=True,
        )
        rows.append(
            {"layers": subnet.depth, "mean_width": width, "build_s": seconds, **taken.metrics()}
            | {"conditions": taken.conditions}
        )
    slowest = max(row["build_s"] for row in rows)
    return conclude([Bound("build and load a candidate in vLLM, s", slowest, BOUND_S)], {"candidates": rows})


def _subnets(folder: Path) -> list[SubNetwork]:
    """The largest, some drawn at random, the smallest."""
    import numpy as np

    from compressor import models

    space = SearchSpace.from_fractions(models.read_shape(models.resolve(str(folder))), DEPTHS, WIDTHS)
    rng = np.random.default_rng(0)
    return [space.full, *(space.sample(rng) for _ in range(DRAWN)), space.smallest]


if __name__ == "__main__":
    sys.exit(main())
