"""Training data: Alpaca's template, loss on responses alone, broken rows named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor import models
from compressor.errors import InputError
from compressor.events import Event, Message
from compressor.supernet.data import load_training_data
from compressor.supernet.losses import IGNORED

ROW = {"instruction": "Name a fruit.", "input": "", "output": "An apple."}


def write(path: Path, rows: list[object]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_alpaca_rows_become_prompts_and_learnt_responses(tiny: models.LoadedModel, tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    examples = load_training_data(write(tmp_path / "a.jsonl", [ROW, row] * 8), tiny.tokenizer, 64)
    assert examples.ids.shape == examples.labels.shape
    assert examples.ids.shape[1] == 64
    text = tiny.tokenizer.decode(examples.ids.flatten())
    assert "### Instruction:\nName a fruit.\n\n### Response:\nAn apple.<|im_end|>Below is" in text
    assert "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3<|im_end|>" in text
    learnt = examples.labels != IGNORED
    assert (examples.labels[learnt] == examples.ids[learnt]).all()
    assert tiny.tokenizer.decode(examples.ids[learnt]).startswith("An apple.<|im_end|>3<|im_end|>An")


@pytest.mark.parametrize("rows", [[{"text": "some words " * 40}], ["some words " * 40]])
def test_texts_are_learnt_whole(tiny: models.LoadedModel, tmp_path: Path, rows: list[object]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    examples = load_training_data(str(path), tiny.tokenizer, 32)
    assert (examples.labels == examples.ids).all()


def test_plain_text_is_learnt_whole(tiny: models.LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some words " * 40)
    examples = load_training_data(str(path), tiny.tokenizer, 32)
    assert tiny.tokenizer.decode(examples.ids[0]).startswith("some words some")


def test_a_few_broken_rows_are_named_and_left_out(tiny: models.LoadedModel, tmp_path: Path) -> None:
    rows: list[object] = [ROW] * 300
    rows[16] = "{broken"
    rows[40] = {"instruction": "No answer."}
    seen: list[Event] = []
    examples = load_training_data(write(tmp_path / "a.jsonl", rows), tiny.tokenizer, 64, seen.append)
    whole = load_training_data(write(tmp_path / "b.jsonl", [ROW] * 298), tiny.tokenizer, 64)
    assert (examples.ids == whole.ids).all()
    (message,) = seen
    assert isinstance(message, Message)
    assert message.level == "warning"
    assert "left out 2 broken rows (row 17: not JSON" in message.text
    assert "row 41: no output" in message.text


def test_one_row_in_a_hundred_may_be_broken_and_no_more(tiny: models.LoadedModel, tmp_path: Path) -> None:
    rows: list[object] = [ROW] * 197 + ["{"] * 2
    load_training_data(write(tmp_path / "a.jsonl", [*rows, ROW]), tiny.tokenizer, 64)
    with pytest.raises(InputError, match=r"3 of 200 rows are broken \(row 198: not JSON"):
        load_training_data(write(tmp_path / "b.jsonl", [*rows, "{"]), tiny.tokenizer, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ROW) + "\n[]\n", r"1 of 2 rows are broken \(row 2: not an object\)"),
        (json.dumps({"instruction": 3, "output": "x"}), "row 1: no instruction"),
        ("", "holds 0 tokens"),
    ],
)
def test_bad_files_are_refused(tiny: models.LoadedModel, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_training_data(str(path), tiny.tokenizer, 32)


@pytest.mark.parametrize(
    ("content", "message"), [(b"[{", "not JSON"), (b"{}", "not a JSON list"), (b"\xff", "UTF-8")]
)
def test_bad_json_is_refused(tiny: models.LoadedModel, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_training_data(str(path), tiny.tokenizer, 32)


def test_a_hub_id_offline_is_refused(tiny: models.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        load_training_data("owner/data", tiny.tokenizer, 32)


def test_real_alpaca_and_gsm8k_load(tiny: models.LoadedModel, data_dir: Path) -> None:
    for name in ("alpaca", "gsm8k"):
        examples = load_training_data(str(data_dir / name / "train.jsonl"), tiny.tokenizer, 256)
        learnt = (examples.labels != IGNORED).float().mean()
        assert 0.1 < learnt < 0.9
