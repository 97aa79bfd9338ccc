"""Several processes tune as one does with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from compressor.models import shape_of_config
from compressor.space import SearchSpace
from compressor.supernet.data import Examples
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, finetune
from compressor.supernet.folder import read_info
from compressor.supernet.losses import IGNORED
from compressor.supernet.processes import Processes, join_processes

from .conftest import make_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r})
from tests.supernet.test_processes import Tuned, tune
from compressor.supernet.processes import join_processes
tuned = tune(**{changes!r})
processes = join_processes()
if processes.rank == 0:
    torch.save([tuned.curve, tuned.weights, tuned.held, processes.count], {out!r})
"""
DDP = ("--multi_gpu",)  # without a GPU: processes on the CPU; --cpu would start a single one
FSDP = ("--use_fsdp", "--fsdp_version", "2")


@dataclass(frozen=True)
class Tuned:
    """Losses by step, the weights in the end, how many elements of the layers each of ``count`` held."""

    curve: dict[int, float]
    weights: dict[str, Tensor]
    held: int
    count: int = 1


def tune(folder: str | None = None, kill_at: int = 0, **changes: Any) -> Tuned:
    """A short tuning on labels; one row in four has none, so that a process may have nothing to learn."""
    torch.set_num_threads(1)
    model = make_model()
    space = SearchSpace(shape_of_config(model.config), (2, 3, 4), (16, 32, 64))
    text = torch.randint(97, (16, 12), generator=torch.Generator().manual_seed(2))
    labels = text.clone()
    labels[::4] = IGNORED
    settings: dict[str, Any] = {"loss": "cross-entropy", "steps": 6, "batch": 4, "lr": 3e-3, "super_every": 2}
    config = FinetuneConfig(checkpoint_minutes=0, **{**settings, **changes})
    curve: dict[int, float] = {}
    held = 0

    def note(network: str, step: int, loss: float) -> None:
        nonlocal held
        curve[step] = loss
        if network == "super":
            parameters = model.model.layers.parameters()
            held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        if step == kill_at:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        kept = None if folder is None else Path(folder)
        finetune(Elastic(model), space, Examples(text, labels), config, on_curve=note, folder=kept)
    return Tuned(curve, model.state_dict(), held)


def launched(tmp_path: Path, flags: tuple[str, ...], **changes: Any) -> Tuned:
    """The same tuning by two processes."""
    script, out = tmp_path / "tune.py", tmp_path / "tuned.pt"
    script.write_text(SCRIPT.format(root=str(ROOT), out=str(out), changes=changes))
    ended = launch(script, flags)
    assert ended.returncode == 0, ended.stderr
    tuned = Tuned(*torch.load(out, weights_only=True))
    assert tuned.count == 2
    return tuned


def launch(script: Path, flags: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    module = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [*module, *flags, str(script)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=script.parent, env=environment
    )


def assert_same(found: Tuned, wanted: Tuned) -> None:
    assert found.curve == {step: pytest.approx(wanted.curve[step], abs=1e-4) for step in found.curve}
    assert list(found.weights) == list(wanted.weights)
    for name, weight in wanted.weights.items():
        assert torch.allclose(found.weights[name], weight, atol=1e-4), name


def test_one_process_is_alone() -> None:
    assert join_processes() == Processes(0, 1)
    assert Processes().part([3, 1, 2]) == [3, 1, 2]
    assert Processes().total(2.5) == 2.5


def test_parts_make_the_whole() -> None:
    parts = [Processes(rank, 3).part(list(range(8))) for rank in range(3)]
    assert sorted(row for part in parts for row in part) == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [DDP, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 4, "gradient_checkpointing": True},
        {"accumulation": 2, "held_out": 4, "check_every": 2},
    ],
    ids=["rows", "adapters", "parts"],
)
def test_two_launched_processes_tune_as_one_does(
    tmp_path: Path, flags: tuple[str, ...], changes: dict[str, Any]
) -> None:
    found, wanted = launched(tmp_path, flags, **changes), tune(**changes)
    assert len(found.curve) == 6
    assert_same(found, wanted)
    assert found.held == wanted.held // (2 if flags == FSDP else 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_sharded_processes_go_on_from_the_checkpoint_of_one_and_back(tmp_path: Path, rank: int) -> None:
    wanted = tune(lora_rank=rank)
    tune(str(tmp_path / "run"), kill_at=4, lora_rank=rank)
    found = launched(tmp_path, FSDP, folder=str(tmp_path / "run"), lora_rank=rank)
    assert min(found.curve) == 4
    assert_same(found, wanted)
    finished = tune(str(tmp_path / "run"), lora_rank=rank)
    assert finished.curve == {}
    assert_same(finished, wanted)


@pytest.mark.slow
def test_sharded_processes_distil_as_whole_ones_do(tmp_path: Path) -> None:
    """Without steps of the super-network: its first gradients are rounding noise, which Adam scales up."""
    settings: dict[str, Any] = {"loss": "distill", "super_every": 0}
    whole = launched(tmp_path, DDP, **settings)
    kept = str(tmp_path / "run")
    tune(kept, kill_at=1, **settings)  # leaves the original's answers, which one process reads
    assert_same(launched(tmp_path, FSDP, folder=kept, **settings), whole)


@pytest.mark.slow
def test_processes_that_would_tune_apart_are_stopped(tmp_path: Path) -> None:
    script = tmp_path / "apart.py"
    script.write_text(
        "import os\nfrom tests.supernet.test_processes import tune\ntune(seed=int(os.environ['RANK']))\n"
    )
    ended = launch(script, DDP)
    assert ended.returncode != 0
    assert "the processes hold different models, data or settings" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_the_documented_script_makes_a_super_network(
    tiny_model_folder: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    document = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    script = document.split("```python\n")[1].split("```")[0]
    assert "path/or/hub-id" in script
    script = script.replace("path/or/hub-id", str(tiny_model_folder)).replace("steps=2000", "steps=4")
    (tmp_path / "tune.py").write_text(script)
    row = {"instruction": "Name a fruit.", "output": "An apple."}
    (tmp_path / "alpaca.jsonl").write_text("\n".join([json.dumps(row)] * 400))
    ended = launch(tmp_path / "tune.py", flags)
    assert ended.returncode == 0, ended.stderr
    assert read_info(tmp_path / "supernet").ordering == "rms+block-influence"
