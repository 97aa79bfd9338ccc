"""A whole run for a profile that serves with vLLM: measured, scored and packaged in it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from pathlib import Path

import pytest

from compressor.manifest import read_manifest
from tests.conftest import SMALL_EFFORT, TINY_PROFILE

pytestmark = pytest.mark.vllm

COMPRESS = Path(__file__).resolve().parents[2] / ".venv" / "bin" / "python"
"""Runs live in the main environment, which has no vLLM; they find it in this one."""


def compress(*args: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMPRESS), "-m", "compressor.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def run(supernet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not COMPRESS.is_file():
        pytest.skip("needs the main environment: make setup")
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.toml").write_text(f'engine = "vllm"\n{TINY_PROFILE}')
    where = ("--profile", str(home / "tiny.toml"), "--model", str(supernet), "--run", str(home / "run"))
    done = compress(*where, *SMALL_EFFORT, "--evaluations", "4", "--winner-minutes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tuning the winner: done" in done.stdout and "tuned alone, the winner" in done.stdout
    assert "every budget met" in done.stdout
    return home / "run"


def test_what_is_packaged_was_measured_in_vllm(run: Path) -> None:
    manifest = read_manifest(run / "package")
    assert manifest.engine == "vllm" and manifest.numerics == "int8"
    (speed,) = manifest.speed
    assert speed.engine == "vllm" and speed.conditions["engine"].startswith("vllm 0.")
    assert speed.tpot_ms > 0 and speed.peak_memory_bytes > 0
    assert 0 <= manifest.accuracy[0].low <= manifest.accuracy[0].value <= manifest.accuracy[0].high <= 1
    assert all(budget.met for budget in manifest.budgets)


def test_so_was_everything_searched_and_the_unpruned_model(run: Path) -> None:
    with sqlite3.connect(run / "ledger.sqlite") as ledger:
        rows = ledger.execute("SELECT DISTINCT engine FROM evaluations WHERE task = 'measure'").fetchall()
    assert rows == [("vllm",)]
    front = json.loads((run / "front.json").read_text())
    assert [reference["name"] for reference in front["references"]] == ["unpruned, bf16", "unpruned, INT8"]
    assert len(front["candidates"]) == 4
    sizes = {c["weight_bytes"] for c in front["candidates"] if c["subnet"] == front["winner"]["subnet"]}
    assert sizes == {read_manifest(run / "package").weight_bytes}


def test_nothing_is_left_behind_or_made_for_another_engine(run: Path) -> None:
    assert not (run / "engine").exists()
    assert not list(run.glob("scored-*"))


def test_another_sub_network_is_packaged_from_it(run: Path) -> None:
    done = compress("package", str(run), "--pick", "smallest")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(run / "package-smallest")
    assert manifest.engine == "vllm" and manifest.accuracy and manifest.speed
    other = compress("package", str(run), "--pick", "fastest", "--engine", "onnxruntime")
    assert other.returncode == 2 and "measured in vllm" in other.stderr
