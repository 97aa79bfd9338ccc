"""The whole way on a tiny model: a run, its package, its resumption, its second thoughts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from compressor.engines.onnx_exact import TARGET_NATS
from compressor.environments import vllm_python
from compressor.ledger import Ledger, Row
from compressor.manifest import read_manifest
from compressor.pipeline import proof
from compressor.pipeline.run import package_pick
from compressor.space import SubNetwork
from tests.conftest import SMALL_EFFORT, TINY_PROFILE, make_tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.toml").write_text(TINY_PROFILE)
    return folder


def command(home: Path, model: Path, run: str, evaluations: int, *more: str) -> list[str]:
    asked = ["--profile", str(home / "tiny.toml"), "--model", str(model), "--run", str(home / run)]
    effort = [*SMALL_EFFORT, "--evaluations", str(evaluations)]
    return [sys.executable, "-m", "compressor.cli", *asked, *effort, *more]


def compress(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compressor.cli", *args], capture_output=True, text=True, timeout=300
    )


def ledger_rows(run: Path) -> list[Row]:
    ledger = Ledger(run / "ledger.sqlite")
    rows = ledger.rows()
    ledger.close()
    return rows


@pytest.fixture(scope="module")
def finished(home: Path, tiny_model_folder: Path) -> Path:
    """A run of 10 evaluations, finished."""
    result = subprocess.run(
        command(home, tiny_model_folder, "run", 10), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "every budget met" in result.stdout
    assert "compress serve" in result.stdout and "compress ask" in result.stdout
    return home / "run"


def test_a_run_ends_with_a_whole_package_and_a_report(finished: Path) -> None:
    manifest = read_manifest(finished / "package")
    assert manifest.engine == "onnxruntime" and manifest.numerics == "int8"
    assert all(budget.met for budget in manifest.budgets)
    assert 0 <= manifest.accuracy[0].low <= manifest.accuracy[0].value <= manifest.accuracy[0].high <= 1
    assert manifest.speed[0].tpot_ms > 0
    assert 0 < manifest.divergence_nats < TARGET_NATS
    assert "<svg" in (finished / "report" / "index.html").read_text()
    assert (finished / "report" / "front_size.png").read_bytes().startswith(b"\x89PNG")
    verified = compress("verify", str(finished / "package"))
    assert verified.returncode == 0, verified.stderr


def test_tuning_on_rows_of_ones_own_is_watched_on_some_of_them(home: Path, tiny_model_folder: Path) -> None:
    rows = [{"instruction": f"Say the number {n}.", "output": f"It is the number {n}."} for n in range(400)]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = command(home, tiny_model_folder, "watched", 3, "--train-data", str(home / "rows.jsonl"))
    asked[asked.index("--tuning-steps") + 1] = "101"
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ledger = Ledger(home / "watched" / "ledger.sqlite")
    watched, whole, parts = (ledger.curve(name) for name in ("held-out", "super", "sub"))
    ledger.close()
    assert [step for step, _ in watched] == [50, 100]
    assert (len(whole), len(parts)) == (51, 50)
    assert "held-out rows" in (home / "watched" / "report" / "index.html").read_text()


def test_the_front_carries_every_form_of_the_unpruned_model(finished: Path) -> None:
    front = json.loads((finished / "front.json").read_text())
    assert [r["numerics"] for r in front["references"]] == ["bf16", "int8", "int4+8", "int4"]
    assert all(r["speed"]["tpot_ms"] > 0 for r in front["references"])
    assert front["references"][0]["accuracy"]["value"] == 1.0
    assert [c["free"] for c in front["candidates"]] == [True, *[False] * 10]


def test_nothing_free_is_better_than_the_winner(finished: Path) -> None:
    """The unpruned model in INT8 meets these budgets, so nothing that is less accurate may win."""
    front = json.loads((finished / "front.json").read_text())
    winner = front["winner"]
    own = next(c for c in front["candidates"] if c["free"])
    assert winner["free"] or winner["search_accuracy"]["value"] >= own["accuracy"]["low"]
    page = (finished / "report" / "index.html").read_text()
    assert ("nothing found beats the unpruned model in INT8" in page) == winner["free"]


def test_the_winner_is_measured_in_turns_with_the_unpruned_model(finished: Path) -> None:
    ratios = read_manifest(finished / "package").speed[0].conditions["beside_unpruned_int8"]
    winner = json.loads((finished / "front.json").read_text())["winner"]
    for figure in ("ttft", "tpot"):
        assert winner[f"{figure}_beside"]["ratio"] == ratios[f"{figure}_ratio"] > 0
    assert ratios["turns"] >= 4
    assert "In turns with the unpruned model" in (finished / "report" / "index.html").read_text()


def test_the_winner_is_tuned_alone_once_and_all_that_leaves_the_run_has_its_weights(
    home: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    # In INT8 the unpruned model would win, which has nothing to learn.
    fewer = TINY_PROFILE.replace('name = "tiny-cpu"', 'name = "int4-cpu"\nnumerics = "int4"')
    (home / "int4.toml").write_text(fewer)
    run = home / "alone-tuned"
    asked = command(home, tiny_model_folder, "alone-tuned", 4)
    asked[asked.index("--profile") + 1] = str(home / "int4.toml")
    told = (
        *("--winner-minutes", "1", "--tuning-minutes", "0.01", "--tuning-steps", "150"),
        *("--tuning-lr", "5e-4", "--text-sequences", "200", "--score-sequences", "64"),
    )
    result = subprocess.run([*asked, *told], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "Tuning the winner: done" in said
    manifest, front = read_manifest(run / "package"), json.loads((run / "front.json").read_text())
    subnet = SubNetwork.from_dict(manifest.architecture.model_dump())
    tuned = run / "tuned" / subnet.digest / "supernet"
    assert front["winner"]["as_found"]["value"] < front["winner"]["accuracy"]["value"]
    assert front["loss_curves"]["winner sub"][0][0] == 1
    assert "before a fine-tuning of its own" in (run / "report" / "index.html").read_text()
    done = compress("export", str(run), "--format", "hf", "--out", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "hf"))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (theirs[name.replace("0", str(subnet.layers[0]), 1)] == ours[name]).all()
    again = subprocess.run([*asked, *told, "--resume"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "Tuning the winner: already done" in again.stdout + again.stderr
    assert read_manifest(run / "package").files == manifest.files


def test_nothing_is_paid_for_twice_when_a_finished_run_goes_on(
    finished: Path, home: Path, tiny_model_folder: Path
) -> None:
    before = ledger_rows(finished)
    more = command(home, tiny_model_folder, "run", 13, "--resume")
    subprocess.run(more, check=True, capture_output=True, timeout=300)
    after = ledger_rows(finished)
    searched = [
        row for row in after if row.key.task == "measure" and row.key.weights == after[-1].key.weights
    ]
    assert [row.id for row in before] == [row.id for row in after[: len(before)]]
    assert len(searched) == 13
    assert len({row.key for row in after}) == len(after)


def test_a_run_killed_three_times_pays_nothing_twice_and_ends_as_one_left_alone(
    home: Path, tiny_model_folder: Path
) -> None:
    subprocess.run(command(home, tiny_model_folder, "alone", 10), check=True, timeout=300)
    asked = command(home, tiny_model_folder, "killed", 10)
    run = home / "killed"
    before: list[Row] = []
    for rows in (10, 16, 22):  # of them the unpruned model has 8, each sub-network 2
        kill_after(rows, asked if rows == 10 else [*asked, "--resume"], run)
        kept, before = before, ledger_rows(run)
        assert identities(before)[: len(kept)] == identities(kept)
        assert rows <= len(before) < 8 + 2 * 10
    resumed = subprocess.run([*asked, "--resume"], capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert identities(ledger_rows(run))[: len(before)] == identities(before)
    alone = home / "alone"
    assert searched(run) == searched(alone) and len(searched(run)) == 10
    fronts = [json.loads((folder / "front.json").read_text()) for folder in (run, alone)]
    ours, theirs = ([(c["subnet"], c["accuracy"]) for c in f["candidates"] if c["on_front"]] for f in fronts)
    assert ours == theirs


def kill_after(rows: int, asked: list[str], run: Path) -> None:
    process = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (run / "ledger.sqlite").exists() and len(ledger_rows(run)) >= rows:
            break
        time.sleep(0.02)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def identities(rows: list[Row]) -> list[tuple[int | None, float]]:
    return [(row.id, row.created_at) for row in rows]


def searched(run: Path) -> list[tuple[str, float]]:
    """What a run evaluated, in its order: sub-networks with their accuracy."""
    weights = read_supernet_hash(run)
    rows = [row for row in ledger_rows(run) if row.key.weights == weights and not row.key.engine]
    return [(row.key.subnet, row.metrics["accuracy"]) for row in rows if ":search:" in row.key.task]


def read_supernet_hash(run: Path) -> str:
    return str(json.loads((run / "supernet" / "supernet.json").read_text())["weights_hash"])


def test_adapters_by_another_recipe_end_in_plain_weights_and_the_report_shows_both_losses(
    home: Path, tiny_model_folder: Path
) -> None:
    recipe = ("--tuning-super-every", "2", "--tuning-loss", "both", "--tuning-teacher", "super")
    asked = command(home, tiny_model_folder, "adapters", 4, "--lora-rank", "4", *recipe)
    result = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    run = home / "adapters"
    tuned, base = (load_file(run / part / "model.safetensors") for part in ("supernet", "base"))
    assert set(tuned) == set(base)
    assert all((tuned[n] != base[n]).any() for n in base if n.endswith(("q_proj.weight", "o_proj.weight")))
    assert all(
        (tuned[n] == base[n]).all() for n in base if n.endswith(("norm.weight", "embed_tokens.weight"))
    )
    ledger = Ledger(run / "ledger.sqlite")
    assert [step for step, _ in ledger.curve("super")] == [1, 3]
    assert [step for step, _ in ledger.curve("sub")] == [2, 4]
    ledger.close()
    assert "Loss of the fine-tuning" in (run / "report" / "index.html").read_text()


def test_another_budget_picks_again_from_the_ledger(finished: Path) -> None:
    before = ledger_rows(finished)
    result = compress("replan", str(finished), "--tpot-budget", "0.000001")
    assert result.returncode == 0, result.stderr
    assert "nothing evaluated meets these budgets" in result.stdout
    assert "OVER" in result.stdout
    assert len(ledger_rows(finished)) == len(before)


def test_another_pick_can_be_packaged(finished: Path, tmp_path: Path) -> None:
    result = compress("package", str(finished), "--pick", "smallest", "--out", str(tmp_path / "small"))
    assert result.returncode == 0, result.stderr
    front = json.loads((finished / "front.json").read_text())["candidates"]
    smallest = min(c["weight_bytes"] for c in front if c["on_front"])
    assert read_manifest(tmp_path / "small").weight_bytes == smallest
    again = compress("package", str(finished), "--pick", "smallest", "--out", str(tmp_path / "small"))
    assert again.returncode == 2 and "exists" in again.stderr
    unknown = compress("package", str(finished), "--pick", "nicest")
    assert unknown.returncode == 2 and "'nicest': use winner, best, smallest, fastest" in unknown.stderr
    assert (
        compress("package", str(finished), "--pick", "winner", "--out", str(tmp_path / "again")).returncode
        == 0
    )
    packaged = [read_manifest(folder).architecture for folder in (finished / "package", tmp_path / "again")]
    assert packaged[0] == packaged[1]


def test_the_report_prints_a_table_and_writes_the_page_anew(finished: Path) -> None:
    page = finished / "report" / "index.html"
    page.unlink()
    result = compress("report", str(finished))
    assert result.returncode == 0, result.stderr
    assert "winner" in result.stdout and "unpruned" in result.stdout
    assert page.is_file()


def test_the_front_can_be_scored_in_the_papers_int8(finished: Path) -> None:
    rescored = compress("report", str(finished), "--llm-int8")
    assert rescored.returncode == 0, rescored.stderr
    assert "before and after LLM.int8" in rescored.stdout
    rows = json.loads((finished / "llm-int8.json").read_text())["rows"]
    assert rows and all(row["after"]["weight_bytes"] < row["before"]["weight_bytes"] for row in rows)
    assert all(0 <= row[form]["accuracy"] <= 1 for row in rows for form in ("before", "after"))
    assert (finished / "report" / "llm-int8.png").read_bytes().startswith(b"\x89PNG")
    taken = [row for row in ledger_rows(finished) if row.key.numerics == "llm-int8"]
    assert len(taken) == len(rows)


def test_a_sub_network_is_compared_with_other_methods_at_its_size(finished: Path) -> None:
    asked = ("compare", str(finished), "--pick", "smallest", "--tuning-minutes", "1")
    first = compress(*asked)
    assert first.returncode == 0, first.stderr
    assert "LLM-Pruner" in first.stdout and "SliceGPT" in first.stdout
    (written,) = (finished / "comparisons").iterdir()
    data = json.loads(written.read_text())
    unpruned, ours, *rivals = data["compared"]
    assert unpruned["score"]["value"] > 0.98  # computed in bf16 it rounds unlike the scorer that asked it
    assert unpruned["ttft"] is None
    for rival in rivals:
        assert 0.8 * ours["parameters"] < rival["parameters"] <= ours["parameters"] < unpruned["parameters"]
        assert 0 <= rival["untuned"]["value"] <= 1 and rival["ttft"]["ratio"] > 0
        assert rival["tuned_minutes"] > 0 and rival["test"]["against"] == rival["name"]
    assert not (finished / "comparing").exists()
    assert "Beside other pruning methods" in (finished / "report" / "index.html").read_text()
    again = compress(*asked)
    assert (again.stdout + again.stderr).count("already done") == 4
    assert json.loads(written.read_text()) == data


def test_what_keeps_all_parameters_has_no_rival(finished: Path) -> None:
    data = json.loads((finished / "front.json").read_text())
    whole = SubNetwork((0, 1, 2, 3), (128,) * 4)
    known = {SubNetwork.from_dict(c["subnet"]).digest for c in data["candidates"]}
    if whole.digest not in known:
        pytest.skip("the search did not evaluate the whole model")
    done = compress("compare", str(finished), "--pick", whole.digest)
    assert done.returncode == 2 and "keeps all" in done.stderr and "--pick" in done.stderr


def test_the_package_answers_through_its_endpoint(finished: Path) -> None:
    result = compress("ask", str(finished / "package"), "Hello?", "--max-tokens", "8")
    assert result.returncode == 0, result.stderr


def test_a_package_with_one_byte_changed_is_refused_by_name(finished: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished / "package", copy)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    result = compress("verify", str(copy))
    assert result.returncode == 2
    assert "model.onnx.data" in result.stderr


def test_tasks_from_local_data_can_be_what_accuracy_means(
    home: Path, tiny_model_folder: Path, data_dir: Path
) -> None:
    asked = command(home, tiny_model_folder, "tasks", 4)
    tasks = ["--tasks", "arc_easy", "--task-data", str(data_dir), "--limit", "8"]
    result = subprocess.run([*asked, *tasks], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(home / "tasks" / "package")
    assert manifest.accuracy[0].task == "arc_easy"
    assert manifest.accuracy[0].items == 8


def test_the_winner_is_exported_to_every_format(finished: Path, tmp_path: Path) -> None:
    widths = read_manifest(finished / "package").architecture.widths
    marks = {"gguf": "", "hf": "model.safetensors", "vllm": "manifest.json", "onnx": "model.onnx"}
    for form, mark in marks.items():
        out = tmp_path / form
        done = compress("export", str(finished), "--format", form, "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert (out / mark if mark else out).is_file()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config.get("intermediate_sizes", [config["intermediate_size"]] * len(widths)) == widths
    again = compress("export", str(finished), "--format", "gguf", "--out", str(tmp_path / "gguf"))
    assert again.returncode == 2 and "exists" in again.stderr


def test_another_pick_is_exported_and_unknown_formats_are_refused(finished: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "small")
    done = compress("export", str(finished), "--format", "hf", "--pick", "smallest", "--out", out)
    assert done.returncode == 0, done.stderr
    done = compress("export", str(finished), "--format", "tflite")
    assert done.returncode == 2 and "gguf, hf, vllm, onnx" in done.stderr


def test_a_package_that_is_not_exact_enough_reads_inputs_in_two_passes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    plain = read_manifest(run / "package")
    target = 0.9 * plain.divergence_nats
    monkeypatch.setattr(proof, "TARGET_NATS", target)
    ledger = sqlite3.connect(run / "ledger.sqlite")
    with ledger:
        ledger.execute("DELETE FROM evaluations WHERE task = ?", (proof.PROOF,))
    ledger.close()
    digest = SubNetwork.from_dict(plain.architecture.model_dump()).digest
    manifest = read_manifest(package_pick(run, digest, tmp_path / "package", lambda _: None))
    assert manifest.architecture == plain.architecture
    assert manifest.fine_inputs and manifest.divergence_nats <= target
    assert manifest.speed[0].conditions["fine_inputs"] == manifest.fine_inputs
    assert [row for row in ledger_rows(run) if row.key.numerics == "int8+fine"]


def test_a_pick_is_packaged_for_vllm(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "vllm"
    done = compress("package", str(finished), "--engine", "vllm", "--pick", "smallest", "--out", str(out))
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    assert manifest.engine == "vllm" and manifest.accuracy == [] and manifest.base_model == "model"
    done = compress("package", str(finished), "--engine", "tensorrt")
    assert done.returncode == 2 and "onnxruntime or vllm" in done.stderr


def test_a_whole_model_is_exported_without_a_run(tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "whole.gguf"
    done = compress("export", str(tiny_model_folder), "--format", "gguf", "--out", str(out))
    assert done.returncode == 0 and out.read_bytes()[:4] == b"GGUF"


@pytest.mark.slow
def test_a_package_for_vllm_is_scored_in_vllm(home: Path, tmp_path: Path) -> None:
    if vllm_python() is None:
        pytest.skip("vLLM is not installed: make setup-vllm")
    model = make_tiny_model(tmp_path / "model", head_dim=32, initializer_range=0.15)
    subprocess.run(command(home, model, "wide", 6), check=True, timeout=300)
    run = home / "wide"
    done = compress("package", str(run), "--engine", "vllm", "--pick", "best")
    assert done.returncode == 0, done.stderr
    (accuracy,) = read_manifest(run / "package-best-vllm").accuracy
    (onnx,) = read_manifest(run / "package").accuracy
    assert (accuracy.task, accuracy.items) == (onnx.task, onnx.items)
    assert 0 < accuracy.value < 1 and accuracy.low <= accuracy.value <= accuracy.high
    assert f"| {accuracy.value:.3f} |" in (run / "package-best-vllm" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({'name = "tiny-cpu"': 'name = "tiny-int4"\nnumerics = "int4"'}, {4}),
        ({"[space]": "[space]\nbits = [8, 4]"}, {4, 8}),
    ],
    ids=["int4", "mixed"],
)
def test_layers_of_four_bits_are_searched_scored_and_packaged(tiny_model_folder, tmp_path, changes, bits):
    text = TINY_PROFILE
    for old, new in changes.items():
        text = text.replace(old, new)
    (tmp_path / "tiny.toml").write_text(text)
    for more in (("--tpot-budget", "50000"), ("--resume",)):
        asked = command(tmp_path, tiny_model_folder, "run", 8, *more)
        result = subprocess.run(asked, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    rows = [
        row for row in ledger_rows(run) if row.key.task.startswith("agreement:search") and not row.key.engine
    ]
    assert {b for row in rows for b in row.subnet.bits} == bits
    numerics = "int4" if bits == {4} else "int8"
    assert {row.key.numerics for row in rows} == {numerics}
    manifest = read_manifest(run / "package")
    assert manifest.numerics == numerics
    best = max(rows, key=lambda row: row.metrics["accuracy"])
    assert best.metrics["accuracy"] < 1  # rounding shows
    asked = [sys.executable, "-m", "compressor.cli", "package", str(run), "--engine", "vllm"]
    result = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert set(read_manifest(run / "package-best-vllm").architecture.bits) <= bits


def test_layers_that_may_have_fewer_bits_are_tuned_for_them(
    home: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    asked = command(home, tiny_model_folder, "bits", 2)
    subprocess.run(asked, check=True, timeout=300)
    (tmp_path / "tiny.toml").write_text(TINY_PROFILE.replace("[space]", "[space]\nbits = [4, 8]"))
    asked[asked.index("--profile") + 1] = str(tmp_path / "tiny.toml")
    result = subprocess.run([*asked, "--resume"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Writing text with the unpruned model: already done" in result.stdout + result.stderr
    assert "Tuning the super-network: done" in result.stdout + result.stderr
    assert {b for row in ledger_rows(home / "bits") for b in row.subnet.bits} == {4, 8}
