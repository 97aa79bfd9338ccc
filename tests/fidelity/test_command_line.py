"""``compress`` on inputs that it cannot use: one line, exit code 2, at once, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor import cli
from tests.conftest import TINY_PROFILE, make_tiny_model
from tests.fidelity.files import write_model
from tests.fidelity.ropes import reference, vocabulary
from tests.fidelity.test_folders import both, edit, put, remove, shards

Make = Callable[[Path, Path], None]


def changed(change: Callable[[Path], None]) -> Make:
    def make(tiny: Path, folder: Path) -> None:
        shutil.copytree(tiny, folder)
        change(folder)

    return make


def part_of_a_file(_: Path, path: Path) -> None:
    write_model(path, reference("default"), {**vocabulary(), "split.count": 2})


def other_shape(**shape: int) -> Make:
    def make(_: Path, folder: Path) -> None:
        make_tiny_model(folder, **shape)

    return make


INPUTS: dict[str, tuple[Make, str]] = {
    "shards without an index": (changed(shards(index=False)), "no model.safetensors.index.json"),
    "a shard missing": (
        changed(shards(index=True, lose="model-00001-of-00002.safetensors")),
        "lacks model-00001-of-00002.safetensors",
    ),
    "training_args.bin alone": (
        changed(both(remove("model.safetensors"), put("training_args.bin", b"x"))),
        "holds no weights",
    ),
    "tokenizer.model alone": (
        changed(both(remove("tokenizer.json"), put("tokenizer.model", b"x"))),
        "pip install sentencepiece",
    ),
    "a head size of 12": (
        other_shape(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=12),
        "its head size is 12, onnxruntime takes multiples of 8",
    ),
    "a hidden size of 96": (
        other_shape(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=24),
        "its hidden size is 96, onnxruntime takes multiples of 64",
    ),
    "a part of a GGUF file": (part_of_a_file, "one of the 2 parts of a model"),
    "relu": (changed(edit("config.json", hidden_act="relu")), "hidden_act is 'relu'"),
    "GPTQ": (changed(edit("config.json", quantization_config={"quant_method": "gptq"})), "quantized (gptq)"),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.argv", ["compress", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ") and "\n" not in line and "bug" not in line
    return line


@pytest.mark.parametrize("case", INPUTS)
def test_a_model_that_cannot_be_used_costs_a_line(
    case: str,
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, message = INPUTS[case]
    (tmp_path / "tiny.toml").write_text(TINY_PROFILE)
    make(tiny_model_folder, tmp_path / "model")
    capsys.readouterr()
    line = refused(
        [
            *("--model", str(tmp_path / "model"), "--profile", str(tmp_path / "tiny.toml")),
            *("--run", str(tmp_path / "run")),
        ],
        capsys,
        monkeypatch,
    )
    assert message in line
    assert not (tmp_path / "run").exists()


def test_broken_training_data_costs_a_line(
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY_PROFILE)
    (tmp_path / "rows.JSONL").write_text(json.dumps({"instruction": "x"}) + "\n")
    line = refused(
        [
            *("--model", str(tiny_model_folder), "--profile", str(tmp_path / "tiny.toml")),
            *("--run", str(tmp_path / "run"), "--train-data", str(tmp_path / "rows.JSONL")),
        ],
        capsys,
        monkeypatch,
    )
    assert "1 of 1 rows are broken (row 1: no output)" in line
    assert not (tmp_path / "run").exists()
