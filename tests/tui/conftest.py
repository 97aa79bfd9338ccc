"""A wizard over recorded facts, which answers at once and always the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.device import Machine
from compressor.errors import CompressorError, InputError
from compressor.request import RunRequest
from tests.tui.sample_run import STARTER
from tui.app import DARK, Wizard, make_app
from tui.facts import ModelFacts, PlanFacts
from tui.probe import Probe

MACHINE = Machine(
    cpu_name="AMD EPYC",
    board="",
    physical_cores=2,
    logical_cores=2,
    usable_cores=2,
    isa=("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
    memory_bytes=int(23.5 * 2**30),
    memory_available_bytes=int(22.1 * 2**30),
    disk_free_bytes=71 * 2**30,
    system="Linux 6.18 x86_64",
)
PLAN = PlanFacts(
    model=STARTER.name,
    layers=30,
    parameters=STARTER.parameters,
    encodings=5 * 10**14,
    distinct=240_000_000_000_000,
    depths=(21, 23, 24, 25, 26, 27, 28, 30),
    widths=(768, 1152, 1536),
    evaluations=40,
    stage_seconds={"text": 120.0, "supernet": 270.0, "export": 55.0, "search": 310.0, "package": 33.0},
    peak_memory_bytes=2_420_000_000,
    disk_bytes=807_000_000,
    full_weight_bytes=151_000_000,
    full_memory_bytes=183_000_000,
    smallest_memory_bytes=104_000_000,
    warnings=(),
)


class RecordedProbe(Probe):
    """Answers as the real probe did once on a 2-core machine, at once and always the same."""

    def __init__(self, plan: PlanFacts | CompressorError = PLAN) -> None:
        self.answer = plan

    async def machine(self) -> Machine:
        return MACHINE

    async def model(self, source: str) -> ModelFacts:
        if source != "starter":
            raise InputError(f"no model '{source}': name 'starter', a folder, a .gguf file or a hub id")
        return STARTER

    async def plan(self, request: RunRequest, parent: Path) -> PlanFacts:  # noqa: ARG002
        if isinstance(self.answer, CompressorError):
            raise self.answer
        return self.answer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run the wizard in; ``runs/`` is made in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def wizard(folder: Path) -> Callable[..., Wizard]:  # noqa: ARG001
    """Builds a wizard over recorded facts."""

    def build(
        run: Path | None = None, probe: Probe | None = None, theme: str = DARK, ahead: bool = False
    ) -> Wizard:
        app = make_app(run, probe or RecordedProbe(), theme, ahead)
        app.choices = app.choices.but(evaluations=40, tuning_minutes=4.5)
        return app

    return build
