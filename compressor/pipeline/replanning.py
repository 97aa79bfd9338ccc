"""Picking a winner again under other budgets, from what the ledger knows; evaluates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compressor.ledger import open_ledger
from compressor.pipeline.candidates import Terms, known_outcomes, paired_ties
from compressor.profile import Profile
from compressor.request import stored_request
from compressor.runfolder import RunFolder
from compressor.search.front import Choice, choose_winner

GIB = 2**30


def budget_limits(profile: Profile) -> dict[str, float]:
    """The profile's budgets by the names of outcomes' values."""
    budgets = profile.budgets
    return {
        "memory_bytes": float(budgets.memory_bytes),
        "ttft_ms": budgets.ttft_ms,
        "tpot_ms": budgets.tpot_ms,
    }


@dataclass(frozen=True)
class Replan:
    """A winner picked again, or the nearest miss, and the command that packages it."""

    run: Path
    choice: Choice
    limits: dict[str, float]

    def print(self, console: Console) -> None:
        chosen = self.choice.nearest
        table = Table("", "budget", "sub-network")
        for name, unit, scale in (
            ("memory_bytes", "GiB", GIB),
            ("ttft_ms", "ms", 1),
            ("tpot_ms", "ms", 1),
        ):
            met = "" if chosen.values[name] <= self.limits[name] else "  OVER"
            table.add_row(
                name.rsplit("_", 1)[0],
                f"{self.limits[name] / scale:.4g} {unit}",
                f"{chosen.values[name] / scale:.4g} {unit}{met}",
            )
        table.add_row("accuracy", "", f"{chosen.values['accuracy']:.3f} (search split)")
        table.add_row("weights", "", f"{chosen.values['weight_bytes'] / 1e6:.1f} MB")
        console.print(table)
        if self.choice.winner is None:
            console.print("nothing evaluated meets these budgets; this is the nearest", highlight=False)
        console.print(
            f"package it:  compress package {self.run} --pick {chosen.subnet.digest} --out FOLDER",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def replan(
    run: Path, memory_gib: float | None = None, ttft_ms: float | None = None, tpot_ms: float | None = None
) -> Replan:
    """The winner under the run's budgets with those given replaced. Raises ``InputError``."""
    folder = RunFolder.open_existing(run)
    profile = stored_request(folder).profile.with_overrides(
        memory_gib=memory_gib, ttft_ms=ttft_ms, tpot_ms=tpot_ms
    )
    limits = budget_limits(profile)
    terms = Terms.from_dict(folder.result("search")["terms"])
    with open_ledger(folder.ledger) as ledger:
        unpruned = terms.of_unpruned(str(folder.result("base")["weights"]))
        outcomes = [*known_outcomes(ledger, unpruned), *known_outcomes(ledger, terms)]
        ties = paired_ties(ledger, lambda outcome: unpruned if outcome.free else terms)
        choice = choose_winner(outcomes, limits, ties)
    return Replan(run, choice, limits)
