"""Several processes tune as one does with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressor.models import shape_of_config
from compressor.space import SearchSpace
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, finetune
from compressor.supernet.processes import Processes, join_processes

from .conftest import make_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys, torch
sys.path.insert(0, {root!r})
from tests.supernet.test_processes import curve_of
from compressor.supernet.processes import join_processes
curve = curve_of()
if join_processes().rank == 0:
    open({out!r}, "w").write(json.dumps(curve))
"""


def curve_of() -> list[float]:
    """Losses of a short tuning on labels."""
    torch.set_num_threads(1)
    model = make_model()
    space = SearchSpace(shape_of_config(model.config), (2, 3, 4), (16, 32, 64))
    text = torch.randint(97, (16, 12), generator=torch.Generator().manual_seed(2))
    config = FinetuneConfig(steps=6, batch=4, lr=3e-3, loss="cross-entropy", super_every=2)
    curve: list[float] = []
    finetune(Elastic(model), space, text, config, on_curve=lambda _network, _step, loss: curve.append(loss))
    return curve


def test_one_process_is_alone() -> None:
    assert join_processes() == Processes(0, 1)
    assert Processes().part([3, 1, 2]) == [3, 1, 2]
    assert Processes().total(2.5) == 2.5


def test_parts_make_the_whole() -> None:
    parts = [Processes(rank, 3).part(list(range(8))) for rank in range(3)]
    assert sorted(row for part in parts for row in part) == list(range(8))


@pytest.mark.slow
def test_two_launched_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    script, out = tmp_path / "tune.py", tmp_path / "curve.json"
    script.write_text(SCRIPT.format(root=str(ROOT), out=str(out)))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        str(script),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(launch, check=True, timeout=300, cwd=ROOT, env=environment)
    assert json.loads(out.read_text()) == pytest.approx(curve_of(), abs=1e-4)
