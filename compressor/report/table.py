"""The result as a table for the terminal: the winner beside the unpruned model."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from compressor.report import wording
from compressor.report.data import ReportData, Score, Speed

UNITS = ("ms", "ms", "tok/s")


def summary_table(data: ReportData) -> Table:
    """The winner, then each reference; the budgets' verdicts below."""
    table = Table(
        title=escape(f"{data.model} on {data.profile}: {wording.headline(data)}"),
        caption=escape(_caption(data)),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column(f"{data.accuracy_name}\n(95% interval)", justify="right")
    table.add_column("weights", justify="right")
    table.add_column("beside\nINT8", justify="right")
    for name, unit in zip(("TTFT", "TPOT", "throughput"), UNITS, strict=True):
        table.add_column(f"{name}\n({unit})", justify="right")
    full = data.reference("int8")
    base = full.weight_bytes if full else None
    if data.winner is not None:
        w = data.winner
        name = f"winner, {wording.numerics(data.numerics, w.subnet)}"
        row = _row(name, w.accuracy, w.weight_bytes, base, w.speed)
        table.add_row(*row, style="bold", end_section=True)
    for r in data.references:
        table.add_row(*_row(r.name, r.accuracy, r.weight_bytes, base, r.speed))
    return table


def _row(
    name: str,
    accuracy: Score | None,
    weight_bytes: int,
    full_bytes: int | None,
    speed: Speed | None,
) -> list[str]:
    spread = wording.interval(accuracy)
    times = (speed.ttft_ms, speed.tpot_ms, speed.throughput_tok_s) if speed else ()
    return [
        escape(name),
        wording.score(accuracy) + (f"\n({spread})" if spread else ""),
        wording.size(weight_bytes),
        wording.against(weight_bytes, full_bytes),
        *([wording.significant(value) for value in times] or [wording.MISSING] * 3),
    ]


def _caption(data: ReportData) -> str:
    lines = [
        f"{wording.BUDGET_NAMES[b.name]}: {wording.budget_figure(b, b.measured)} "
        f"of {wording.budget_figure(b, b.limit)}, {wording.budget_verdict(b)}"
        for b in data.budgets
    ]
    if data.winner is not None:
        lines += [*wording.beside_free(data), *wording.about_winner(data.winner)]
    lines += data.notes
    lines.append(f"{wording.workload(data)}; {data.engine} on {data.device}")
    return "\n".join(lines)
