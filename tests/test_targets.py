"""Which profiles can be run for vLLM, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import InputError, UnfitMachineError
from compressor.pipeline import targets
from compressor.pipeline.targets import check_target
from compressor.presets import PRESETS
from compressor.profile import Profile
from compressor.request import RunRequest


def ask(cluster: str = "", **profile: object) -> RunRequest:
    settings = {
        "name": "mine",
        "engine": "vllm",
        "device": {"kind": "cpu", "memory_gib": 1},
        "budgets": {"memory_gib": 1, "ttft_ms": 1000, "tpot_ms": 100},
        "workload": {"prompt_tokens": 16, "output_tokens": 8},
        **profile,
    }
    return RunRequest(
        model="starter", profile=Profile.model_validate(settings), effort=PRESETS["quick"], cluster=cluster
    )


def test_vllm_has_no_weights_of_four_bits() -> None:
    with pytest.raises(InputError, match="asks vLLM for weights of 4 bits"):
        check_target(ask(numerics="int4"))


def test_vllm_is_not_measured_through_a_cluster() -> None:
    with pytest.raises(InputError, match="without --cluster"):
        check_target(ask(cluster="127.0.0.1:6379"))


def test_a_missing_vllm_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "vllm_python", lambda: None)
    with pytest.raises(UnfitMachineError, match="make setup-vllm"):
        check_target(ask())


def test_what_is_here_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "vllm_python", lambda: Path("python"))
    check_target(ask())
    check_target(ask(engine="onnxruntime", numerics="int4"))
