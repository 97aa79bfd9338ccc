"""What a run ends with: each budget met or missed, what was kept, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from compressor.report.data import ReportData
from compressor.report.table import summary_table


@dataclass(frozen=True)
class Verdict:
    """A finished run: its folder and everything the report shows."""

    folder: Path
    data: ReportData

    @property
    def budgets_met(self) -> bool:
        return self.data.winner is not None and all(budget.met for budget in self.data.budgets)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for events."""
        winner = self.data.winner
        return {
            "budgets_met": self.budgets_met,
            "budgets": {
                b.name: {"limit": b.limit, "measured": b.measured, "met": b.met} for b in self.data.budgets
            },
            "accuracy": winner.accuracy.value if winner else None,
            "weight_bytes": winner.weight_bytes if winner else None,
            "next": dict(self.data.next_commands),
        }

    def print(self, console: Console) -> None:
        """The table, the budgets, and the exact next commands."""
        console.print(summary_table(self.data))
        for note in self.data.notes:
            console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        for purpose, command in self.data.next_commands:
            console.print(f"{purpose}:  {command}", highlight=False, markup=False, soft_wrap=True)
