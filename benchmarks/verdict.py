"""How every benchmark ends: its figures beside their bounds, one line of JSON, and the exit code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bound:
    """A figure beside what it must be; NaN where it could not be measured, which is not met."""

    name: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return bool(self.value <= self.bound if self.at_most else self.value >= self.bound)

    @property
    def word(self) -> str:
        """``met``, ``MISSED`` or ``NOT MEASURED``."""
        if math.isnan(self.value):
            return "NOT MEASURED"
        return "met" if self.met else "MISSED"

    def entry(self) -> dict[str, Any]:
        """For JSON, which knows no NaN."""
        value = None if math.isnan(self.value) else round(float(self.value), 6)
        return {"value": value, "bound": self.bound, "at_most": self.at_most, "met": self.met}


def conclude(bounds: Sequence[Bound], figures: Mapping[str, Any] | None = None) -> int:
    """Print the bounds' table and the line of JSON, ``figures`` in it; 0 if every bound is met, else 1."""
    width = max((len(bound.name) for bound in bounds), default=0)
    print()
    for bound in bounds:
        sign = "<=" if bound.at_most else ">="
        print(f"{bound.name:{width}s} {bound.value:12.5g}  {sign} {bound.bound:<9g} {bound.word}")
    print(json.dumps({**(figures or {}), "bounds": {bound.name: bound.entry() for bound in bounds}}))
    return 0 if all(bound.met for bound in bounds) else 1
