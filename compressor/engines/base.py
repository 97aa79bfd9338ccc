"""The engine protocol: what serves is what is measured, one file a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import Numerics, SubNetwork


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that serving takes, by purpose; computed before anything runs."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


class Candidate(Protocol):
    """A sub-network loaded in an engine, ready to be measured and scored."""

    @property
    def subnet(self) -> SubNetwork: ...

    @property
    def numerics(self) -> Numerics: ...


class Engine(Protocol):
    """Builds, measures and packages sub-networks of one super-network."""

    name: str

    def build(self, subnet: SubNetwork, numerics: Numerics = "int8") -> Candidate:
        """Load a sub-network. Raises ``CompressorError`` where the engine cannot."""
        ...

    def bench(self, candidate: Candidate, workload: Workload, *, max_seconds: float = 3.0) -> Measurement:
        """Measure a candidate on a workload, within about ``max_seconds``."""
        ...

    def write(
        self, subnet: SubNetwork, folder: Path, fields: Mapping[str, Any], *, numerics: Numerics = "int8"
    ) -> None:
        """Write the package of a sub-network; ``fields`` go to its manifest. Whole or absent."""
        ...
