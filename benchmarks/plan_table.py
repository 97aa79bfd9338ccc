"""What a run takes on every GPU profile, by the plan's arithmetic: ``make plan-table`` writes docs/plan.md.

Nothing is measured here and no GPU is needed: memory is computed from shapes, time from what is advertised.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from compressor.device import GIB, Gpu, Machine
from compressor.engines.memory import served_memory
from compressor.errors import CompressorError
from compressor.pipeline.needs import Estimate
from compressor.pipeline.plan import (
    SHOWN_SHARE,
    WORK,
    capacity_of,
    check_fits,
    check_memory_budget,
    profile_space,
    settled,
)
from compressor.pipeline.plan_table import duration, settings, size
from compressor.presets import PRESETS
from compressor.profile import Profile, load_profiles
from compressor.request import fresh
from compressor.space import ModelShape

SHAPES = {
    "LLaMA2-7B": ModelShape(4096, 11008, 32, 32, 32, 128, 32000, max_position_embeddings=4096),
    "Llama-3.1-8B": ModelShape(4096, 14336, 32, 32, 8, 128, 128256, max_position_embeddings=131072),
    "LLaMA2-13B": ModelShape(5120, 13824, 40, 40, 40, 128, 32000, max_position_embeddings=4096),
}
HOST_GIB_A_GPU = 2.0
"""The host's memory for each GiB of the GPU's, as clouds rent them, and no less than 64 GiB."""

HEAD = """# What a run takes on GPUs

Written by `make plan-table`: `compress --tasks paper` by the plan's arithmetic, on made-up machines with
each profile's GPU, as much of its memory as drivers leave, and twice as much on the host (64 GiB at least).
**None of it is measured.** Weights, caches and states are exact, activations count what a layer keeps;
times are {peak} of the advertised matrix operations and the memory's bandwidth, times the share that each
kind of work reaches. `compress --dry-run` prints the same for your machine, your model and your flags, with
the GPU's own speed where there is one.

The plan settles what nobody named: all weights are tuned where that fits, else adapters of rank 16; a step
is taken in as many parts, and texts are written so many at once, as fit; the super-network stays on the GPU
while vLLM measures where both fit (turns: where they don't). Of the unpruned model, numerics that don't fit
the GPU are left out of the comparison.
"""


def machine(profile: Profile) -> Machine:
    """A made-up machine with the profile's GPU."""
    shown = int(profile.device.memory_gib * GIB * SHOWN_SHARE)
    host = int(max(64.0, HOST_GIB_A_GPU * profile.device.memory_gib) * GIB)
    gpu = Gpu(profile.device.match[0], shown, profile.device.compute_capability)
    return Machine("", "", 16, 16, 16, (), host, host, 2**44, (gpu,))


def estimate(profile: Profile, shape: ModelShape, preset: str) -> Estimate:
    request = fresh({"profile": profile.name, "preset": preset, "tasks": "paper"})
    space = profile_space(shape, profile)
    return settled(request, shape, space, capacity_of(profile, machine(profile)))


def refusal(found: Estimate) -> str:
    """Why the plan refuses, or nothing."""
    try:
        profile = found.request.profile
        check_memory_budget(profile, served_memory(found.shape, found.space.smallest, profile))
        check_fits(found)
    except CompressorError as error:
        return str(error)
    return ""


def overview(gpus: list[Profile]) -> list[str]:
    """Every model on every GPU with every preset: what is tuned, the largest stage, the time."""
    lines = ["## All models, GPUs and presets", ""]
    lines += ["| model | profile | " + " | ".join(PRESETS) + " |", "|---|---|" + "---|" * len(PRESETS)]
    for model, shape in SHAPES.items():
        for profile in gpus:
            cells = [cell(estimate(profile, shape, preset)) for preset in PRESETS]
            lines.append(f"| {model} | `{profile.name}` | " + " | ".join(cells) + " |")
    return [*lines, ""]


def cell(found: Estimate) -> str:
    if reason := refusal(found):
        return "refused: " + reason.split(":")[0]
    stages = found.stages()
    held = {name: need for name, need in stages.items() if name != "references"}
    name, most = max(held.items(), key=lambda pair: pair[1].gpu_bytes)
    kept = "" if found.choices.keeps_both else ", turns"
    total = sum(need.seconds for need in stages.values())
    chosen = settings(found.choices)
    return f"{chosen}{kept}; {size(most.gpu_bytes)} ({name}); {duration(total)}"


def stages(gpus: list[Profile], preset: str) -> list[str]:
    """A table a model: every stage on every GPU, with one preset."""
    lines = []
    for model, shape in SHAPES.items():
        lines += [f"## {model}, `--preset {preset}`, every stage: GPU and host memory, time", ""]
        found = {profile.name: estimate(profile, shape, preset) for profile in gpus}
        fits = {name: made for name, made in found.items() if not refusal(made)}
        lines += [
            "| stage | " + " | ".join(f"`{name}`" for name in fits) + " |",
            "|---|" + "---|" * len(fits),
        ]
        for stage in next(iter(fits.values())).stages():
            needs = [made.stages()[stage] for made in fits.values()]
            cells = [f"{size(n.gpu_bytes)}, {size(n.host_bytes)}, {duration(n.seconds)}" for n in needs]
            lines.append(f"| {WORK[stage]} | " + " | ".join(cells) + " |")
        lines.append("")
        lines += [f"- `{name}`: {reason}." for name, made in found.items() if (reason := refusal(made))]
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/plan.md"))
    gpus = sorted(
        (profile for profile in load_profiles() if profile.device.kind == "cuda"),
        key=lambda profile: (profile.device.memory_gib, profile.name),
    )
    text = "\n".join([HEAD.format(peak="four fifths"), *overview(gpus), *stages(gpus, "paper")])
    out = parser.parse_args().out
    out.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
