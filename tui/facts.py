"""What the probe finds out, as values that cross a process boundary as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compressor.device import Gpu, Machine

if TYPE_CHECKING:
    from compressor.space import ModelShape


@dataclass(frozen=True)
class ModelFacts:
    """A base model that can be used, from its configuration alone."""

    name: str
    kind: str
    license: str
    parameters: int
    shape: ModelShape


@dataclass(frozen=True)
class PlanFacts:
    """What a run is about to do. Bytes; seconds are estimates."""

    model: str
    layers: int
    parameters: int
    encodings: int
    distinct: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    evaluations: int
    stage_seconds: dict[str, float]
    peak_memory_bytes: int
    disk_bytes: int
    full_weight_bytes: int
    full_memory_bytes: int
    smallest_memory_bytes: int
    warnings: tuple[str, ...]

    @property
    def total_seconds(self) -> float:
        return sum(self.stage_seconds.values())


def machine_from_dict(data: dict[str, Any]) -> Machine:
    gpus = tuple(Gpu(**gpu) for gpu in data["gpus"])
    return Machine(**{**data, "isa": tuple(data["isa"]), "gpus": gpus})


def model_from_dict(data: dict[str, Any]) -> ModelFacts:
    from compressor.space import ModelShape

    return ModelFacts(**{**data, "shape": ModelShape(**data["shape"])})


def plan_from_dict(data: dict[str, Any]) -> PlanFacts:
    lists = ("depths", "widths", "warnings")
    return PlanFacts(**{**data, **{name: tuple(data[name]) for name in lists}})


def to_dict(facts: Machine | ModelFacts | PlanFacts) -> dict[str, Any]:
    return asdict(facts)
