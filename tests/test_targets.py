"""Which profiles can be run for vLLM, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compressor import device
from compressor.engines import host
from compressor.engines.onnx_export import export
from compressor.errors import InputError, UnfitMachineError
from compressor.events import Event, Message
from compressor.ledger import Ledger
from compressor.pipeline import targets
from compressor.pipeline.context import Context
from compressor.pipeline.targets import OnnxTarget, VllmTarget, check_target
from compressor.presets import PRESETS
from compressor.profile import Profile, load_profile
from compressor.request import RunRequest
from compressor.runfolder import RunFolder, Weights
from compressor.space import SubNetwork

FULL, SMALL = SubNetwork((0, 1, 2, 3), (128,) * 4), SubNetwork((0, 3), (64, 32), (4, 8))


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


def test_vllm_takes_weights_of_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "vllm_python", lambda: Path("python"))
    check_target(ask(numerics="int4"))
    check_target(ask(space={"bits": [4, 8]}))


def test_on_a_gpu_all_that_its_users_would_pick_instead_is_measured(tmp_path: Path) -> None:
    for name, expected in (
        ("a100-40g", ("int8", "int4")),
        ("h100-80g", ("fp8", "int8", "int4")),
        ("b200-180g", ("fp8", "int4")),
    ):
        request = ask().model_copy(update={"profile": load_profile(name)})
        run = RunFolder.create_or_update(tmp_path / name, request.model_dump(mode="json"))
        context = Context(run, request, Ledger(run.ledger), device.detect(), lambda _: None)
        assert VllmTarget(context, Weights(tmp_path, tmp_path)).reference_numerics == expected


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


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def target(tiny_model_folder: Path, tmp_path: Path, told: list[Event]) -> OnnxTarget:
    request = ask(engine="onnxruntime").model_copy(
        update={"effort": replace(PRESETS["quick"], bench_seconds=0.1)}
    )
    run = RunFolder.create_or_update(tmp_path / "run", request.model_dump(mode="json"))
    context = Context(run, request, Ledger(run.ledger), device.detect(), told.append)
    made = export(tiny_model_folder, tmp_path / "export", (8, 4))
    return OnnxTarget(context, FULL, Weights(tiny_model_folder, made.folder))


def test_on_a_disturbed_machine_sub_networks_are_measured_in_turns(
    target: OnnxTarget, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "OTHER_LOAD_SHARE", -1.0)
    first = target.bench(SMALL)
    monkeypatch.undo()
    later = target.bench(SubNetwork((1,), (32,)))
    for measured in (first, later):
        assert measured.conditions["tpot_ratio"] > 0 and measured.conditions["reference_tpot_ms"] > 0
    (message,) = [event.text for event in told if isinstance(event, Message)]
    assert message.startswith("other processes used") and "in turns" in message


def test_where_memory_lacks_for_both_a_sub_network_is_measured_alone(
    target: OnnxTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_free(needed_bytes: int) -> None:
        raise UnfitMachineError(f"{needed_bytes} bytes are needed")

    monkeypatch.setattr(host, "OTHER_LOAD_SHARE", -1.0)
    monkeypatch.setattr(targets, "require_free_memory", none_free)
    measured = target.bench(SMALL)
    assert "tpot_ratio" not in measured.conditions and measured.conditions["unfit"]
