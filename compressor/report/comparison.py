"""A sub-network beside other ways to the same size: the same rows for the terminal and the page."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from compressor.report import wording
from compressor.report.data import Comparison, SideBySide

HEADERS = ("parameters", "of the whole", "before", "after", "95% interval", "TTFT", "TPOT", "minutes")


def comparison_table(comparison: Comparison) -> Table:
    """One row a way; below it what the paired tests say. Narrow enough for a terminal of 80 columns."""
    table = Table(
        title=escape(title(comparison)),
        caption=escape("\n".join(remarks(comparison))),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for header in ("parameters", "before", "after tuning\n(95% interval)", "TTFT", "TPOT", "minutes"):
        table.add_column(header, justify="right")
    for name, parameters, share, before, after, interval, ttft, tpot, minutes in rows(comparison):
        table.add_row(
            escape(name),
            f"{parameters}\n({share})",
            before,
            f"{after}\n({interval})" if interval else after,
            *(times.replace(" ± ", "\n± ") for times in (ttft, tpot)),
            minutes,
        )
    return table


def title(comparison: Comparison) -> str:
    return f"{comparison.model} in {comparison.numerics}, {comparison.task} on unseen items"


def rows(comparison: Comparison) -> list[tuple[str, str, str, str, str, str, str, str, str]]:
    """For each way its name, then a cell for each of ``HEADERS``."""
    full = comparison.compared[0].parameters
    return [
        (
            each.name,
            f"{each.parameters / 1e6:,.1f}M",
            wording.percent(each.parameters / full),
            wording.score(each.untuned),
            wording.score(each.score),
            wording.interval(each.score),
            _times(each.ttft),
            _times(each.tpot),
            f"{each.tuned_minutes:.1f}" if each.tuned_minutes else wording.MISSING,
        )
        for each in comparison.compared
    ]


def remarks(comparison: Comparison) -> list[str]:
    """What the paired tests say, and what the times are."""
    tests = [
        wording.paired_test(each.test, winner="the sub-network")
        for each in comparison.compared
        if each.test is not None
    ]
    return [
        *(f"The sub-network: {test[0].lower()}{test[1:]}" for test in tests),
        "Before and after a tuning of their own, which took so many minutes; the sub-network comes out of a "
        "super-network that was tuned before, which is counted. TTFT and TPOT are over the unpruned model's, "
        "in PyTorch, measured in turns.",
    ]


def _times(beside: SideBySide | None) -> str:
    """The ratio and half its 95% interval."""
    return "1" if beside is None else f"{beside.ratio:.2f} ± {beside.ratio * beside.half_interval:.2f}"
