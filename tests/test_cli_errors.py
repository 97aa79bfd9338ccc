"""Bad input at the command line: one line that says what and what to do, exit code 2, nothing written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROFILE = """
name = "mine"
[device]
kind = "cpu"
memory_gib = 0.5
[budgets]
memory_gib = {memory}
ttft_ms = 60000
tpot_ms = 60000
[workload]
prompt_tokens = 8
output_tokens = 4
"""


def compress(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compressor.cli", *args],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def assert_nothing_written(folder: Path) -> None:
    assert not (folder / "runs").exists() and not (folder / "run").exists()


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE.format(memory=0.4))
    return path


def test_an_unknown_profile_names_the_nearest(tmp_path: Path) -> None:
    assert_refused(compress(tmp_path, "--profile", "laptop-cpi"), "laptop-cpi", "laptop-cpu")
    assert_nothing_written(tmp_path)


def test_what_to_measure_is_named_once(tmp_path: Path) -> None:
    assert_refused(compress(tmp_path, "measure"), "package", "--url")
    assert_refused(compress(tmp_path, "measure", "starter", "--url", "http://127.0.0.1:1/v1"), "one thing")
    assert_refused(compress(tmp_path, "measure", "--url", "127.0.0.1:1/v1"), "--url", "http://")


def test_a_missing_profile_file(tmp_path: Path) -> None:
    assert_refused(compress(tmp_path, "--profile", "nowhere.toml"), "nowhere.toml")


@pytest.mark.parametrize("memory", ["-1", "0", "nan"])
def test_a_profile_with_an_impossible_budget_names_file_and_field(tmp_path: Path, memory: str) -> None:
    (tmp_path / "bad.toml").write_text(PROFILE.format(memory=memory))
    assert_refused(compress(tmp_path, "--profile", "bad.toml"), "bad.toml", "budgets.memory_gib")
    assert_nothing_written(tmp_path)


def test_a_profile_without_a_budget_names_it(tmp_path: Path, profile: Path) -> None:
    profile.write_text(profile.read_text().replace("tpot_ms = 60000\n", ""))
    assert_refused(compress(tmp_path, "--profile", "mine.toml"), "mine.toml", "budgets.tpot_ms")


def test_a_negative_budget_flag(tmp_path: Path) -> None:
    assert_refused(compress(tmp_path, "--profile", "starter-cpu", "--memory-budget", "-3"), "memory_gib")
    assert_nothing_written(tmp_path)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_profile_of_a_device_that_is_not_here(tmp_path: Path) -> None:
    result = compress(tmp_path, "--profile", "a100-40g")
    assert_refused(result, "profile 'a100-40g' needs a CUDA device", "this machine has none", "pick one of")
    assert_nothing_written(tmp_path)


def test_an_unknown_task_names_the_nearest(tmp_path: Path, profile: Path, tiny_model_folder: Path) -> None:
    result = compress(
        tmp_path,
        "--profile",
        profile.name,
        "--model",
        str(tiny_model_folder),
        "--tasks",
        "arc_esy",
        "--run",
        "run",
    )
    assert_refused(result, "arc_esy", "arc_easy")


def test_an_unknown_preset_and_algorithm(tmp_path: Path, profile: Path) -> None:
    assert_refused(compress(tmp_path, "--profile", profile.name, "--preset", "huge"), "huge", "quick")
    assert_refused(compress(tmp_path, "--profile", profile.name, "--algorithm", "magic"), "magic", "linas")


def test_a_folder_that_holds_no_model(tmp_path: Path, profile: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(compress(tmp_path, "--profile", profile.name, "--model", "empty"), "holds no model")
    assert_nothing_written(tmp_path)


def test_a_model_that_is_not_llama_like(tmp_path: Path, profile: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert_refused(compress(tmp_path, "--profile", profile.name, "--model", "gpt"), "not LLaMA-like", "gpt2")
    assert_nothing_written(tmp_path)


def test_budgets_that_nothing_meets_say_which_and_by_how_much(
    tmp_path: Path, profile: Path, tiny_model_folder: Path
) -> None:
    result = compress(
        tmp_path, "--profile", profile.name, "--model", str(tiny_model_folder), "--memory-budget", "0.00001"
    )
    assert_refused(result, "memory budget", "MiB more", "--memory-budget")
    assert_nothing_written(tmp_path)


def test_a_run_folder_of_another_model_is_left_alone(
    tmp_path: Path, profile: Path, tiny_model_folder: Path
) -> None:
    from compressor.presets import effort
    from compressor.profile import load_profile
    from compressor.request import RunRequest
    from compressor.runfolder import RunFolder

    request = RunRequest(model="starter", profile=load_profile(str(profile)), effort=effort("quick"))
    folder = RunFolder.create(tmp_path / "run", request.model_dump(mode="json"))
    before = folder.run_file.read_bytes()
    resumed = compress(tmp_path, "--run", "run", "--resume", "--model", str(tiny_model_folder))
    assert_refused(resumed, "model 'starter'", "--run")
    again = compress(tmp_path, "--run", "run", "--profile", profile.name)
    assert_refused(again, "--resume")
    assert folder.run_file.read_bytes() == before
    assert [p.name for p in folder.path.iterdir()] == ["run.json"]


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"format_version": 1, "request": {"model": 3}}')
    assert_refused(compress(tmp_path, "--run", "run", "--resume"), "run.json", "damaged")


def test_an_unknown_flag_and_a_missing_argument(tmp_path: Path) -> None:
    assert_refused(compress(tmp_path, "--no-such-flag"), "--no-such-flag")
    assert_refused(compress(tmp_path, "ask"), "PACKAGE")


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    assert_refused(compress(tmp_path, "ask", ".", "Hello?"), "is not a package")


def test_help_shows_examples_and_loads_nothing_heavy(tmp_path: Path) -> None:
    result = compress(tmp_path, "--help")
    assert result.returncode == 0
    assert "compress --profile starter-cpu" in result.stdout
    code = (
        "import sys; from typer.testing import CliRunner; from compressor.cli import app; "
        "CliRunner().invoke(app, ['--help']); "
        "heavy = ('torch', 'transformers', 'onnxruntime', 'pymoo', 'matplotlib'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert loaded.stdout.strip() == "[]"
