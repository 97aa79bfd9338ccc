"""Energy counters: read where there are any, wrapped or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.engines import energy
from compressor.engines.energy import EnergyMeter


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters of the CPU alone, also on a machine whose GPUs have some."""
    monkeypatch.setattr(energy, "_gpus_joules", lambda: None)


def zone(folder: Path, name: str, microjoules: int) -> Path:
    made = folder / name
    made.mkdir(exist_ok=True)
    (made / "energy_uj").write_text(f"{microjoules}\n")
    (made / "max_energy_range_uj").write_text("10000000\n")
    return made


def test_packages_add_up_and_their_parts_do_not_count_twice(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        zone(tmp_path, name, 1_000_000)
    meter = EnergyMeter(tmp_path)
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        zone(tmp_path, name, 3_500_000)
    assert meter.joules() == pytest.approx(5.0)


def test_a_counter_that_wraps(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 9_000_000)
    meter = EnergyMeter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 500_000)
    assert meter.joules() == pytest.approx(1.5)


def test_a_device_that_reports_none_has_no_figure(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).joules() is None
