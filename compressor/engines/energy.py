"""Energy that the device reports: Intel's and AMD's RAPL counters for CPU packages, NVML for GPUs.

Most virtual machines and boards report none; then there is no figure.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts from its making on."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._began = {zone: _number(zone / "energy_uj") for zone in self._zones}
        self._gpus_began = _gpus_joules()

    def joules(self) -> float | None:
        """What CPU packages and GPUs used since; None where nothing is reported."""
        used = [spent for zone in self._zones if (spent := self._spent(zone)) is not None]
        gpus = _gpus_joules()
        if gpus is not None and self._gpus_began is not None:
            used.append(gpus - self._gpus_began)
        return sum(used) if used else None

    def _spent(self, zone: Path) -> float | None:
        before, now = self._began[zone], _number(zone / "energy_uj")
        if before is None or now is None:
            return None
        if now < before:  # the counter wrapped
            now += _number(zone / "max_energy_range_uj") or 0
        return (now - before) / 1e6


def _gpus_joules() -> float | None:
    """Joules of all GPUs since their driver was loaded."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return float(sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles)) / 1e3
    except Exception:  # no library, no driver, or a GPU that counts none
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
