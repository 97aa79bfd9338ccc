"""Flags become a request; a resumed run remembers its own and takes changes on top."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from compressor.errors import InputError, RunConflictError
from compressor.presets import PRESETS
from compressor.request import RunRequest, fresh, stored_request, understand
from compressor.runfolder import RunFolder

STARTER = {"profile": "starter-cpu", "model": "starter"}


def start(path: Path, **asked: object) -> RunRequest:
    """What a first call asks, with its run folder made."""
    path, request = understand({**STARTER, **asked}, path, resume=False)
    RunFolder.create(path, request.model_dump(mode="json"))
    return request


def test_a_request_survives_its_run_folder(tmp_path: Path) -> None:
    request = start(tmp_path / "run", preset="quick", tasks="arc_easy, winogrande", limit=5, seed=3)
    assert request.tasks == ("arc_easy", "winogrande")
    assert stored_request(RunFolder.open_existing(tmp_path / "run")) == request


@pytest.mark.parametrize("preset", PRESETS)
def test_an_effort_reads_the_same_to_the_last_digit_after_it_was_stored(preset: str) -> None:
    request = fresh({"profile": "starter-cpu", "preset": preset, "tuning_minutes": 5})
    stored = RunRequest.model_validate_json(request.model_dump_json())
    assert json.dumps(asdict(stored.effort)) == json.dumps(asdict(request.effort))
    whole = RunRequest.model_validate_json(
        fresh({"profile": "starter-cpu", "preset": preset}).model_dump_json()
    )
    assert json.dumps(asdict(whole.effort)) == json.dumps(asdict(PRESETS[preset]))


def test_a_resumed_run_needs_no_flag_but_its_folder(tmp_path: Path) -> None:
    request = start(tmp_path / "run", preset="quick", memory_budget=0.5)
    assert understand({}, tmp_path / "run", resume=True) == (tmp_path / "run", request)
    assert request.profile.budgets.memory_gib == 0.5


def test_a_resumed_run_takes_new_budgets_and_effort_and_keeps_the_rest(tmp_path: Path) -> None:
    request = start(tmp_path / "run", preset="quick", tuning_steps=7)
    _, changed = understand({"tpot_budget": 3.0, "evaluations": 99}, tmp_path / "run", resume=True)
    assert changed.profile.budgets.tpot_ms == 3.0
    assert changed.profile.budgets.ttft_ms == request.profile.budgets.ttft_ms
    assert changed.effort.evaluations == 99
    assert changed.effort.tuning_steps == 7


def test_adapters_stay_asked_for_until_taken_back(tmp_path: Path) -> None:
    assert start(tmp_path / "run", lora_rank=8).lora_rank == 8
    assert understand({}, tmp_path / "run", resume=True)[1].lora_rank == 8
    assert understand({"lora_rank": 0}, tmp_path / "run", resume=True)[1].lora_rank == 0


def test_a_recipe_is_told_flag_by_flag_and_kept(tmp_path: Path) -> None:
    asked = start(tmp_path / "run", tuning_recipe="sandwich", tuning_loss="both", tuning_alpha=0.3)
    assert asked.tuning.told == {"recipe": "sandwich", "loss": "both", "alpha": 0.3}
    _, changed = understand({"tuning_alpha": 0.0, "tuning_lr": 1e-4}, tmp_path / "run", resume=True)
    assert changed.tuning.told == {"recipe": "sandwich", "loss": "both", "alpha": 0.0, "lr": 1e-4}


def test_the_loss_follows_the_data_unless_told() -> None:
    free, rows = fresh(STARTER), fresh({**STARTER, "train_data": "rows.jsonl"})
    assert (free.tuning_loss, free.keeps_teacher) == ("distill", True)
    assert (rows.tuning_loss, rows.keeps_teacher) == ("cross-entropy", False)
    assert fresh({**STARTER, "train_data": "rows.jsonl", "tuning_loss": "both"}).keeps_teacher
    assert not fresh({**STARTER, "tuning_teacher": "super"}).keeps_teacher


def test_resume_starts_a_run_that_does_not_exist_yet(tmp_path: Path) -> None:
    path, _ = understand(STARTER, tmp_path / "new", resume=True)
    assert path == tmp_path / "new"
    assert not path.exists()


def test_another_model_is_another_run(tmp_path: Path) -> None:
    start(tmp_path / "run")
    with pytest.raises(RunConflictError, match="--run"):
        understand({"model": "owner/other"}, tmp_path / "run", resume=True)


def test_a_run_is_named_after_model_and_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, _ = understand({"profile": "starter-cpu", "model": "./models/My Model.gguf"}, None, resume=False)
    assert path == Path("runs/My-Model.gguf-starter-cpu")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"evaluations": 0}, "--evaluations"),
        ({"tuning_minutes": -1.0}, "--tuning-minutes"),
        ({"limit": 0}, "--limit"),
        ({"num_fewshot": -1}, "--num-fewshot"),
        ({"threads": 0}, "--threads"),
        ({"lora_rank": -1}, "--lora-rank"),
        ({"tuning_recipe": "burger"}, "--tuning-recipe.*sandwich"),
        ({"tuning_super_every": -1}, "--tuning-super-every"),
        ({"tuning_alpha": 0.0, "tuning_gamma": 0.0}, "--tuning-alpha and --tuning-gamma"),
        ({"tuning_lr": float("nan")}, "--tuning-lr"),
        ({"tuning_temperature": 0.0}, "--tuning-temperature.*greater than 0"),
        ({"tasks": "agreement,arc_easy"}, "stands alone"),
        ({"preset": "huge"}, "quick"),
        ({"algorithm": "magic"}, "linas"),
    ],
)
def test_a_flag_out_of_range_is_named(flags: dict[str, object], word: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=word):
        understand({**STARTER, **flags}, tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_presets_ask_for_more_and_more() -> None:
    quick, standard, paper = (PRESETS[name] for name in ("quick", "standard", "paper"))
    assert quick.evaluations < standard.evaluations < paper.evaluations == 250
    assert quick.tuning_steps < standard.tuning_steps < paper.tuning_steps


def test_flags_replace_single_counts_of_the_workload() -> None:
    asked = fresh({"profile": "starter-cpu", "prompt_tokens": 32, "concurrency": 4})
    assert asked.profile.workload.label == "32+64x4"


def test_a_workload_of_nothing_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"workload\.output_tokens.*greater than 0"):
        fresh({"profile": "starter-cpu", "output_tokens": 0})
