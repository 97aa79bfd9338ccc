"""The user's files, whatever program wrote them, and texts that begin as the model's texts do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import models
from compressor.errors import InputError
from compressor.evaluation.taskdata import Source, SplitNames, load_splits, read_rows
from compressor.events import Event, Message
from compressor.profile import load_profile
from compressor.supernet.data import load_training_data
from compressor.supernet.rows import check_file, read_pieces
from compressor.supernet.sampling import leading_ids, sample_text
from tests.conftest import TINY_PROFILE, make_tiny_tokenizer

MARK = "\ufeff"
BREAKS = ("\u2028", "\u2029", "\u0085", "\x0c", "\x1c")
"""What ``str.splitlines`` cuts at and JSON Lines doesn't."""


@pytest.mark.parametrize("mark", BREAKS[:3])
def test_rows_end_at_line_feeds_alone(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": f"one{mark}two {i}"}, ensure_ascii=False) for i in range(5)]
    path.write_text("\r\n".join(rows) + "\n", encoding="utf-8", newline="")
    seen: list[Event] = []
    assert [piece.response for piece in read_pieces(str(path), seen.append)] == [
        f"one{mark}two {i}" for i in range(5)
    ]
    assert not seen


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.JSONL", "rows.json", "ROWS.Json"])
@pytest.mark.parametrize("mark", ["", MARK])
def test_endings_in_capitals_and_byte_order_marks_are_understood(
    name: str, mark: str, tmp_path: Path
) -> None:
    rows = [{"instruction": "Name a fruit.", "output": "An apple."}] * 2
    text = json.dumps(rows) if name.lower().endswith(".json") else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(mark + text, encoding="utf-8")
    pieces = read_pieces(str(tmp_path / name))
    assert [piece.response for piece in pieces] == ["An apple."] * 2
    assert "### Instruction:" in pieces[0].prompt


def test_a_mark_before_plain_text_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(MARK + "plain", encoding="utf-8")
    assert read_pieces(str(tmp_path / "a.txt"))[0].response == "plain"


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "UTF-16": ("rows".encode("utf-16"), "as UTF-8 text"),
    "broken": (b"{", "rows are broken"),
    "empty": (b"", "holds no text"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_data_that_cannot_be_read_is_named_before_the_run(case: str, tmp_path: Path) -> None:
    content, message = UNREADABLE[case]
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_file(str(tmp_path / "rows.jsonl"))


def test_a_model_without_an_end_token_learns_texts_end_to_end(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = None
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "some words " * 20}) + "\n")
    seen: list[Event] = []
    examples = load_training_data(str(tmp_path / "rows.jsonl"), tokenizer, 16, seen.append)
    assert (examples.ids >= 0).all()
    assert any(isinstance(event, Message) and "no end token" in event.text for event in seen)


def test_a_profile_with_a_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.TOML"
    path.write_text(MARK + TINY_PROFILE, encoding="utf-8")
    assert load_profile(str(path)).name == "tiny-cpu"


def test_task_items_with_a_mark_and_capitals_are_read(tmp_path: Path) -> None:
    row = {"question": "Why\u2028so?", "answer": "x"}
    folder = tmp_path / "own"
    folder.mkdir()
    text = MARK + "\r\n".join([json.dumps(row, ensure_ascii=False)] * 2)
    (folder / "test.JSONL").write_text(text, encoding="utf-8", newline="")
    assert read_rows(folder / "test.JSONL") == [row] * 2
    source = Source("own", "somebody/own", None, SplitNames(test="test"), tmp_path)
    assert load_splits(source)["test"][0] == row


@pytest.fixture
def beginning_with_bos() -> Any:
    """A tokenizer like Llama 3's: BOS comes from the post-processor, and no flag says so."""
    from tokenizers import processors

    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert not getattr(tokenizer, "add_bos_token", False)
    return tokenizer


def test_texts_of_the_model_begin_with_bos(beginning_with_bos: Any, tiny_model_folder: Path) -> None:
    loaded = models.load(models.resolve(str(tiny_model_folder)))
    assert leading_ids(beginning_with_bos) == [1]
    assert leading_ids(loaded.tokenizer) == []
    ids = sample_text(loaded.model, beginning_with_bos, 4, 12).ids
    assert torch.equal(ids[:, 0], torch.ones(4, dtype=ids.dtype))
    assert (sample_text(loaded.model, loaded.tokenizer, 4, 12).ids[::2, 0] != 1).all()


def test_training_rows_begin_with_bos_and_end_once(beginning_with_bos: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Add.", "output": "3"}\n{"text": "plain"}\n' * 4)
    examples = load_training_data(str(tmp_path / "rows.jsonl"), beginning_with_bos, 40)
    text = beginning_with_bos.decode(examples.ids.flatten())
    assert text.startswith("<|im_start|>Below is")
    assert "3<|im_end|><|im_start|>plain<|im_end|><|im_start|>Below" in text


def test_what_stands_after_every_text_is_not_put_into_rows(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    (tmp_path / "rows.jsonl").write_text('{"text": "plain words"}\n' * 8)
    text = tokenizer.decode(load_training_data(str(tmp_path / "rows.jsonl"), tokenizer, 16).ids.flatten())
    assert "plain words<|im_end|>plain" in text
