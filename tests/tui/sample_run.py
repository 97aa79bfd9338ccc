"""A run of the starter as its folder would look, with invented figures: for the screens' pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from compressor import events
from compressor.engines.memory import required_memory_bytes
from compressor.report import data as report
from compressor.request import RunRequest, fresh
from compressor.runfolder import RunFolder, write_json
from compressor.space import ModelShape, SearchSpace, SubNetwork, weight_bytes
from tui.facts import ModelFacts

SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49152, tie_word_embeddings=True, max_position_embeddings=8192)
STARTER = ModelFacts("SmolLM2-135M-Instruct", "starter", "apache-2.0", 134_515_008, SHAPE)
BEGAN = 1_700_000_000.0
_HOLDER = """
import sys, time
from pathlib import Path
from compressor.runfolder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    try:
        time.sleep(120)
    except KeyboardInterrupt:
        sys.exit(130)
"""
STAGES = (
    ("base", "Loading the model", 0, "steps", 3.2),
    ("text", "Writing text with the unpruned model", 34_560, "tokens", 71.0),
    ("supernet", "Tuning the super-network", 400, "steps", 270.0),
    ("export", "Exporting to INT8", 0, "steps", 31.0),
    ("references", "Measuring the unpruned model", 3, "references", 24.0),
)


def request() -> RunRequest:
    """With layers of 8 bits throughout, so that the memory budget is a line among the bytes."""
    asked = fresh({"profile": "starter-cpu", "model": "starter", "preset": "quick", "memory_budget": 0.19})
    space = asked.profile.space.model_copy(update={"bits": None})
    return asked.model_copy(update={"profile": asked.profile.model_copy(update={"space": space})})


def space() -> SearchSpace:
    fractions = request().profile.space
    return SearchSpace.from_fractions(
        SHAPE,
        fractions.depth_fractions,
        fractions.width_fractions,
        drop_order=(*range(12, 30), *range(12)),
    )


def candidates(count: int = 40) -> list[report.Candidate]:
    """Sub-networks with figures that follow their size, and a little noise."""
    rng, full = np.random.default_rng(7), weight_bytes(SHAPE, space().full, "int8")
    found = []
    for _ in range(count):
        subnet = space().sample(rng)
        size = weight_bytes(SHAPE, subnet, "int8")
        share = size / full
        accuracy = float(np.clip(0.98 - 0.55 * (1 - share) ** 1.3 + rng.normal(0, 0.012), 0, 1))
        speed = report.Speed(900 * share + 20 * rng.random(), 9.5 * share + 0.2, 112 / share)
        score = report.Score(accuracy, accuracy - 0.004, accuracy + 0.004, 1908)
        found.append(report.Candidate(subnet, size, score, speed))
    best: list[report.Candidate] = []
    for candidate in sorted(found, key=lambda c: c.weight_bytes):
        assert candidate.accuracy is not None
        if not best or candidate.accuracy.value > best[-1].accuracy.value:  # type: ignore[union-attr]
            best.append(candidate)
    front = {c.subnet for c in best if c.weight_bytes < 0.125 * 2**30}
    return [
        report.Candidate(c.subnet, c.weight_bytes, c.accuracy, c.speed, on_front=c.subnet in front)
        for c in found
    ]


def run_events(count: int = 40) -> list[tuple[float, events.Event]]:
    """What the run told, up to ``count`` evaluations of 40; 40 is the whole run."""
    told: list[tuple[float, events.Event]] = []
    now = BEGAN
    for stage, title, total, unit, seconds in STAGES:
        told.append((now, events.StageStarted(stage, title, total, unit)))
        now += seconds
        told.append((now, events.StageFinished(stage, seconds)))
    told.append((now, events.Message("the unpruned model takes 175 MiB; the budget is 138 MiB", "warning")))
    told.append((now, events.StageStarted("search", "Searching sub-networks", 40, "sub-networks")))
    for index, candidate in enumerate(candidates()[:count]):
        now += 6.5
        told.append((now, evaluated(index, candidate)))
        told.append((now, events.StageProgress("search", index + 1, 40)))
    if count < 40:
        return told
    verdict = {"budgets_met": True, "accuracy": 0.9}
    told.append((now, events.StageFinished("search", 260.0)))
    told.append((now, events.RunFinished("runs/sample", verdict)))
    return told


def evaluated(index: int, candidate: report.Candidate) -> events.CandidateEvaluated:
    assert candidate.accuracy is not None and candidate.speed is not None
    values = {
        "accuracy": candidate.accuracy.value,
        "weight_bytes": float(candidate.weight_bytes),
        "throughput_tok_s": candidate.speed.throughput_tok_s,
    }
    return events.CandidateEvaluated(index, candidate.subnet.to_dict(), values, candidate.on_front)


def report_data() -> report.ReportData:
    found = candidates()
    profile = request().profile
    within = [
        c
        for c in found
        if required_memory_bytes(SHAPE, c.subnet, profile.workload).total <= profile.budgets.memory_bytes
    ]
    won = max(within, key=lambda c: c.accuracy.value if c.accuracy else 0.0)
    assert won.accuracy is not None and won.speed is not None
    full = space().full
    return report.ReportData(
        model=STARTER.name,
        profile="starter-cpu",
        device="AMD EPYC, 2 cores",
        engine="onnxruntime",
        numerics="int8",
        task="agreement",
        workload=report.Workload(128, 64, 1),
        num_layers=30,
        intermediate_size=1536,
        candidates=tuple(found),
        references=(
            reference("unpruned, bf16 in PyTorch", "bf16", full, 1.0, 1300.0, 31.0, 30.0),
            reference("unpruned, INT8", "int8", full, 0.982, 930.0, 9.7, 101.0),
            reference("unpruned, INT4", "int4", full, 0.871, 990.0, 8.1, 121.0),
        ),
        winner=report.Winner(
            won.subnet,
            won.weight_bytes,
            report.Score(
                won.accuracy.value - 0.01, won.accuracy.value - 0.03, won.accuracy.value + 0.01, 1908
            ),
            won.speed,
            won.accuracy,
            tests=(report.PairedTest("unpruned, INT8", 0.0004, 31, 92),),
            ttft_beside=report.SideBySide(0.784, 0.021),
            tpot_beside=report.SideBySide(0.812, 0.013),
        ),
        budgets=(
            report.Budget("memory_gib", 0.19, 0.17, True),
            report.Budget("ttft_ms", 1500, won.speed.ttft_ms, True),
            report.Budget("tpot_ms", 40, won.speed.tpot_ms, True),
        ),
    )


def reference(
    name: str, numerics: str, full: SubNetwork, accuracy: float, ttft: float, tpot: float, rate: float
) -> report.Reference:
    size = weight_bytes(SHAPE, full, numerics)  # type: ignore[arg-type]
    score = report.Score(accuracy, accuracy - 0.006, min(1.0, accuracy + 0.006), 1908)
    return report.Reference(name, numerics, size, score, score, report.Speed(ttft, tpot, rate))


def write_run(path: Path, count: int = 40) -> RunFolder:
    """The folder of that run: finished for 40 evaluations, stopped in its search for fewer."""
    folder = RunFolder.create(path, request().model_dump(mode="json"))
    lines = [json.dumps({**event.to_dict(), "time": moment}) for moment, event in run_events(count)]
    folder.events.write_text("".join(line + "\n" for line in lines))
    if count >= 40:
        write_json(folder.front, TypeAdapter(report.ReportData).dump_python(report_data(), mode="json"))
    return folder


@contextmanager
def worked_on(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder within the block, as a run in the background does."""
    command = [sys.executable, "-c", _HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        try:
            yield holder
        finally:
            if holder.poll() is None:
                holder.kill()
