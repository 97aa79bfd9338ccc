"""A plan as people read it: memory and time of every stage."""

from __future__ import annotations

from rich.table import Table

from compressor.device import GIB
from compressor.pipeline.needs import Choices
from compressor.pipeline.plan import WORK, Plan


def plan_table(plan: Plan) -> Table:
    """A row a stage; memory of the GPU only where one computes."""
    on_gpu = plan.capacity.on_gpu
    columns = ["stage", *(["GPU memory"] if on_gpu else []), "host memory", "time"]
    table = Table(*columns, title=plan.summary().split(" (")[0], title_justify="left")
    for name, need in plan.stages.items():
        gpu = [size(need.gpu_bytes)] if on_gpu else []
        table.add_row(WORK[name], *gpu, size(need.host_bytes), duration(need.seconds))
    total = [""] * (len(columns) - 2)
    table.add_row("all of it", *total, duration(plan.total_seconds))
    return table


def size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count else "-"


def duration(seconds: float) -> str:
    """In the unit that leaves a number above one."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def settings(choices: Choices) -> str:
    """What is tuned, and in how many parts a step."""
    tuned = f"adapters {choices.lora_rank}" if choices.lora_rank else "all weights"
    return f"{tuned}, {choices.accumulation} parts" if choices.accumulation > 1 else tuned
