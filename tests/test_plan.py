"""The plan on made-up machines: what each stage takes, what is chosen by that, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from compressor import device
from compressor.cli import app
from compressor.device import GIB, Gpu, Machine
from compressor.errors import InputError, UnfitMachineError
from compressor.pipeline import plan
from compressor.pipeline.needs import Capacity, Choices, Estimate
from compressor.pipeline.plan import ADAPTER_RANK, capacity_of, check_fits, make_plan, profile_space, settled
from compressor.presets import PRESETS
from compressor.profile import Profile, load_profile, load_profiles
from compressor.request import RunRequest, fresh
from compressor.space import ModelShape
from compressor.weight_files import expected_tensors
from tests.conftest import make_tiny_tokenizer

LLAMA2_7B = ModelShape(4096, 11008, 32, 32, 32, 128, 32000)
LLAMA31_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128256, max_position_embeddings=131072)
LLAMA2_13B = ModelShape(5120, 13824, 40, 40, 40, 128, 32000)
SMALL_1B = ModelShape(2048, 5632, 22, 32, 4, 64, 32000)
SHAPES = {"7B": LLAMA2_7B, "8B": LLAMA31_8B, "13B": LLAMA2_13B, "1B": SMALL_1B}
GPUS = [profile.name for profile in load_profiles() if profile.device.kind == "cuda"]
PARAMETERS_7B = 6_738_415_616


def machine(profile: Profile, host_gib: float = 256, gpu_bytes: int = 0) -> Machine:
    """A made-up machine with the profile's GPU."""
    host = int(host_gib * GIB)
    size = gpu_bytes or int(profile.device.memory_gib * GIB * 0.985)
    gpu = Gpu(f"NVIDIA {profile.device.match[0]}", size, profile.device.compute_capability or "8.0")
    return Machine("CPU", "", 16, 16, 16, (), host, host, 2**42, (gpu,))


def estimate(
    name: str, shape: ModelShape, host_gib: float = 256, gpu_bytes: int = 0, **flags: object
) -> Estimate:
    request = fresh({"profile": name, "preset": "standard", **flags})
    capacity = capacity_of(request.profile, machine(request.profile, host_gib, gpu_bytes))
    return settled(request, shape, profile_space(shape, request.profile), capacity)


def on_cpu(shape: ModelShape, **flags: object) -> Estimate:
    request = fresh({"profile": "starter-cpu", "preset": "standard", **flags})
    rank = int(str(flags.get("lora_rank", 0)))
    capacity = Capacity(1e12, 20e9, 2**40)
    return Estimate(request, shape, profile_space(shape, request.profile), capacity, Choices(rank))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GPUS)
def test_every_stage_fits_or_the_plan_refuses(name: str, shape: str, preset: str) -> None:
    found = estimate(name, SHAPES[shape], preset=preset)
    fits = all(
        need.gpu_bytes <= found.capacity.gpu_bytes and need.host_bytes <= found.capacity.host_bytes
        for stage, need in found.stages().items()
        if stage != "references"
    )
    if fits:
        check_fits(found)
        return
    with pytest.raises(UnfitMachineError, match=r"GiB.*(smallest that would do|no GPU of|at least)"):
        check_fits(found)


def test_what_fits_is_chosen_without_being_asked() -> None:
    assert estimate("h100-80g", SMALL_1B).choices.lora_rank == 0
    assert estimate("a100-40g", LLAMA2_7B).choices.lora_rank == ADAPTER_RANK
    assert estimate("a100-40g", LLAMA2_7B, lora_rank=8).choices.lora_rank == 8


def test_all_weights_asked_for_by_name_are_refused_where_adapters_would_do() -> None:
    with pytest.raises(UnfitMachineError, match=r"all weights.*leave --lora-rank out"):
        check_fits(estimate("a100-40g", LLAMA2_7B, lora_rank=0))


def test_the_refusal_names_the_smallest_device_that_would_do() -> None:
    with pytest.raises(
        UnfitMachineError, match=r"of which there are 14\.\d.*smallest that would do has 24 GiB"
    ):
        check_fits(estimate("t4-16g", LLAMA2_7B, gpu_bytes=int(14.6 * GIB)))


def test_too_little_memory_of_the_host_is_refused_too() -> None:
    with pytest.raises(UnfitMachineError, match=r"writing text takes .* GiB of memory.*--text-sequences"):
        check_fits(estimate("a100-40g", LLAMA2_7B, host_gib=16, preset="paper"))


def test_frozen_weights_on_a_gpu_count_two_bytes_and_on_a_cpu_four() -> None:
    gpu = estimate("a100-40g", LLAMA2_7B)
    cpu = on_cpu(LLAMA2_7B, lora_rank=16)
    assert gpu.weights == 2 * PARAMETERS_7B and cpu.weights == 4 * PARAMETERS_7B
    assert 14e9 < gpu.tuning(30).gpu_bytes < 20e9
    assert 27e9 < cpu.tuning(30).host_bytes < 45e9


def test_all_weights_take_eighteen_bytes_a_parameter_and_four_more_rounded() -> None:
    plain = on_cpu(LLAMA2_7B)
    whole = replace(plain, space=replace(plain.space, bits=(8,)))
    assert plain.tuning(30).host_bytes - whole.tuning(30).host_bytes == 4 * PARAMETERS_7B
    assert whole.tuning(30).host_bytes > 18 * PARAMETERS_7B


def test_what_the_unpruned_model_thought_is_counted_where_it_is_kept() -> None:
    free, data = on_cpu(LLAMA2_7B, lora_rank=16), on_cpu(LLAMA2_7B, lora_rank=16, train_data="rows.jsonl")
    assert free.tuning(30).host_bytes - data.tuning(30).host_bytes == 2048 * 256 * 4096 * 4


def test_a_rank_that_spares_nothing_is_refused_before_anything_loads() -> None:
    with pytest.raises(InputError, match="lower --lora-rank"):
        estimate("a100-40g", LLAMA2_7B, lora_rank=4096)


def test_a_step_is_taken_in_parts_where_it_does_not_fit_whole() -> None:
    whole, parts = (estimate(name, LLAMA31_8B, preset="paper") for name in ("a100-80g", "l4-24g"))
    assert whole.choices.accumulation == 1 < parts.choices.accumulation


def test_as_many_texts_are_written_at_once_as_fit() -> None:
    small, large = (estimate(name, LLAMA2_7B, preset="paper") for name in ("a100-40g", "h100-80g"))
    assert small.choices.text_batch < large.choices.text_batch == 128
    assert small.text().gpu_bytes <= small.capacity.gpu_bytes
    assert small.text().seconds > large.text().seconds


def test_the_super_network_leaves_the_gpu_where_vllm_would_not_fit_beside_it() -> None:
    roomy, tight = estimate("h200-141g", SMALL_1B), estimate("l4-24g", LLAMA2_7B)
    assert roomy.choices.keeps_both and not tight.choices.keeps_both
    assert tight.measuring().host_bytes > tight.weights, "it waits on the host"
    assert roomy.measuring().gpu_bytes > roomy.scoring().gpu_bytes


def test_tasks_are_counted() -> None:
    agreement, paper = (estimate("a100-40g", LLAMA2_7B, tasks=tasks) for tasks in ("agreement", "paper"))
    more = estimate("a100-40g", LLAMA2_7B, tasks="paper", limit=40398)
    assert paper.scoring().seconds > 5 * agreement.scoring().seconds
    assert more.scoring().seconds > 3 * paper.scoring().seconds
    one = estimate("a100-40g", LLAMA2_7B, tasks="arc_easy")
    assert one.candidate_seconds < paper.candidate_seconds


def test_racing_is_taken_up_where_scoring_is_long_and_never_against_the_users_word() -> None:
    asked = {"tasks": "paper", "preset": "paper"}
    assert estimate("a100-40g", LLAMA2_7B, **asked).choices.racing
    assert not estimate("a100-40g", LLAMA2_7B, racing=False, **asked).choices.racing
    assert not estimate("h100-80g", SMALL_1B, **asked).choices.racing
    assert not estimate("a100-40g", LLAMA2_7B).choices.racing, "agreement has too few sequences"


def test_the_papers_setting_searches_within_three_hours() -> None:
    found = estimate("a100-40g", LLAMA2_7B, tasks="paper", preset="paper")
    assert found.request.effort.evaluations == 250
    assert found.scoring().seconds + found.measuring().seconds < 3 * 3600


def test_export_is_counted_only_where_there_is_one() -> None:
    assert "export" not in estimate("a100-40g", LLAMA2_7B).stages()
    assert on_cpu(SMALL_1B).stages()["export"].seconds > 0


def llama2_folder(folder: Path) -> Path:
    """What a plan reads of LLaMA2-7B: its configuration, and that there are weights."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    make_tiny_tokenizer().save_pretrained(folder)
    _write_holes(folder)
    return folder


def _write_holes(folder: Path) -> None:
    """A file of all the tensors that the configuration asks for, which takes no disk: it is a hole."""
    entries, end = {}, 0
    for name, dims in expected_tensors(LLAMA2_7B).items():
        begin, end = end, end + 2 * math.prod(dims)
        entries[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)


def made_up(monkeypatch: pytest.MonkeyPatch, name: str, gpu_bytes: int = 0, host_gib: float = 83) -> None:
    """``device.detect`` finds the profile's GPU."""
    found = machine(load_profile(name), host_gib, gpu_bytes)
    monkeypatch.setattr(device, "detect", lambda: found)
    monkeypatch.setattr(plan, "check_disk", lambda *_: None)


def compress(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_7b_folder_on_an_a100_is_planned_with_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, "a100-40g", 42_300_000_000)
    made = make_plan(asked_7b(tmp_path), device.detect(), tmp_path)
    assert (made.choices.lora_rank, made.request.lora_rank) == (16, 16)
    assert made.stages["tuning"].gpu_bytes < 42.3e9 and made.peak_memory_bytes < 42.3e9
    assert any("adapters of rank 16" in warning for warning in made.warnings)


def test_on_a_large_enough_a100_all_its_weights_are_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, "a100-40g", 180_000_000_000, host_gib=256)
    made = make_plan(asked_7b(tmp_path), device.detect(), tmp_path)
    assert made.request.lora_rank == 0 and made.stages["tuning"].gpu_bytes > 121e9


def test_a_7b_model_whose_weights_are_to_be_tuned_on_40_gb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, "a100-40g", 42_300_000_000)
    with pytest.raises(UnfitMachineError, match="leave --lora-rank out"):
        make_plan(asked_7b(tmp_path, lora_rank=0), device.detect(), tmp_path)


def asked_7b(folder: Path, **flags: object) -> RunRequest:
    model = llama2_folder(folder / "llama2-7b")
    return fresh({"profile": "a100-40g", "model": str(model), "tasks": "paper", **flags})


def test_a_dry_run_prints_memory_and_time_of_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, "a100-40g", 42_300_000_000)
    model = llama2_folder(tmp_path / "llama2-7b")
    shown = compress("--profile", "a100-40g", "--model", model, "--run", tmp_path / "run", "--dry-run")
    assert shown.exit_code == 0, shown.output
    for words in ("adapters of rank 16", "scoring sub-networks", "GPU memory", "host memory", "time"):
        assert words in " ".join(shown.output.split())
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_no_profile_is_for_is_named_where_a_cpu_profile_is_taken() -> None:
    found = on_cpu(SMALL_1B)
    unknown = replace(machine(load_profile("l4-24g")), gpus=(Gpu("Tesla K80", 11 * GIB, "3.7"),))
    assert any("no profile is for this machine's Tesla K80" in w for w in plan.plan_warnings(found, unknown))
    known = machine(load_profile("l4-24g"))
    assert not any("no profile is for" in warning for warning in plan.plan_warnings(found, known))
