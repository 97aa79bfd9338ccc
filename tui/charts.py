"""What the scatter shows: points and lines in the units of its axes, for each of its views."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compressor.report.analysis import planar_front

Dot = tuple[float, float]
MIB = 2**20
VIEWS = ("size", "speed")


@dataclass(frozen=True)
class Sample:
    """An evaluated model: accuracy 0 to 1, weights in bytes, output tokens/s; None where not measured."""

    accuracy: float | None
    weight_bytes: float | None
    throughput_tok_s: float | None


@dataclass(frozen=True)
class Chart:
    """One view, ready to draw. ``budget_x`` is where the budget's line stands, if it has one here."""

    title: str
    others: tuple[Dot, ...] = ()
    front: tuple[Dot, ...] = ()
    unpruned: tuple[Dot, ...] = ()
    marked: tuple[Dot, ...] = ()
    budget_x: float | None = None

    @property
    def empty(self) -> bool:
        return not (self.others or self.front or self.unpruned)


def make_chart(
    view: str,
    accuracy_name: str,
    samples: Iterable[Sample],
    unpruned: Iterable[Sample] = (),
    marked: Iterable[Sample] = (),
    weight_budget_bytes: float | None = None,
) -> Chart:
    """The chart of one of ``VIEWS``: accuracy over size, or accuracy over throughput."""
    by_size = view == "size"
    dots = placed(samples, by_size)
    front = tuple(planar_front(dots, smaller_x=by_size))
    return Chart(
        title=f"{accuracy_name} % over {'MiB' if by_size else 'tokens/s'}",
        others=tuple(dot for dot in dots if dot not in front),
        front=front,
        unpruned=tuple(placed(unpruned, by_size)),
        marked=tuple(placed(marked, by_size)),
        budget_x=weight_budget_bytes / MIB if by_size and weight_budget_bytes else None,
    )


def placed(samples: Iterable[Sample], by_size: bool) -> list[Dot]:
    """The samples that have both figures, as dots."""
    found = []
    for sample in samples:
        x = sample.weight_bytes if by_size else sample.throughput_tok_s
        if x is not None and sample.accuracy is not None:
            found.append((x / MIB if by_size else x, 100 * sample.accuracy))
    return found
