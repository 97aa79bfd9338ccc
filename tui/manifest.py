"""A package's manifest for people, and whether a folder holds a certain sub-network."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import CompressorError
from compressor.manifest import Manifest, read_manifest
from tui import words
from tui.results import Pick

BUDGET_WORDS = {
    "memory_gib": ("memory", "GiB"),
    "ttft_ms": ("first token", "ms"),
    "tpot_ms": ("each token", "ms"),
}


def holds(folder: Path, pick: Pick) -> bool:
    """Whether the folder is a package of just this sub-network."""
    try:
        return read_manifest(folder).architecture.model_dump() == pick.candidate.subnet.to_dict()
    except CompressorError:
        return False


def manifest_lines(manifest: Manifest) -> str:
    """The manifest for people."""
    lines = [
        f"Name       {manifest.name}",
        f"Base       {manifest.base_model} {manifest.base_revision}".rstrip(),
        f"Licence    {manifest.license or 'not named'}",
        f"Model      {words.count(manifest.parameters)} parameters, "
        f"{len(manifest.architecture.layers)} layers, {manifest.numerics}, "
        f"context {manifest.context_length:,}",
        f"Weights    {words.size(manifest.weight_bytes)} in {len(manifest.files)} files",
    ]
    lines += [
        f"Accuracy   {words.percent(a.value)} {a.task} "
        f"({words.interval(a.low, a.high)}, {a.items:,} unseen items)"
        for a in manifest.accuracy
    ]
    lines += [
        f"Speed      first token {words.milliseconds(s.ttft_ms)}, each {words.milliseconds(s.tpot_ms)}, "
        f"{words.rate(s.throughput_tok_s)} on {s.device}"
        for s in manifest.speed
    ]
    for budget in manifest.budgets:
        name, unit = BUDGET_WORDS[budget.name]
        lines.append(
            f"Budget     {'✓' if budget.met else '✗'} {name}: {words.significant(budget.measured)} "
            f"of {words.significant(budget.limit)} {unit}"
        )
    return "\n".join(lines)
