"""Local task data: read, checked line by line, and split for search and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import InputError
from compressor.evaluation.taskdata import Source, SplitNames, load_splits

ARC = {
    "id": "1",
    "question": "What is wet?",
    "choices": {"text": ["water", "sand"], "label": ["A", "B"]},
    "answerKey": "A",
}
WINOGRANDE = {"sentence": "The _ sat.", "option1": "cat", "option2": "dog", "answer": "1"}
MMLU = {"question": "2+2?", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 3}
TARGETS = {"choices": ["yes", "no"], "labels": [1, 0]}
TRUTHFULQA = {"question": "Is it?", "mc1_targets": TARGETS, "mc2_targets": TARGETS}

KINDS = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", SplitNames("train", "validation", "test"), ARC),
    "winogrande": ("allenai/winogrande", "winogrande_xl", SplitNames("train", "validation"), WINOGRANDE),
    "mmlu": ("cais/mmlu", "anatomy", SplitNames(test="test", fewshot="dev"), MMLU),
    "truthfulqa_mc": (
        "truthfulqa/truthful_qa",
        "multiple_choice",
        SplitNames(validation="validation"),
        TRUTHFULQA,
    ),
}


def source(kind: str, folder: Path) -> Source:
    path, name, splits, _ = KINDS[kind]
    return Source(kind, path, name, splits, folder)


def write(folder: Path, kind: str, split: str, rows: list[Any]) -> None:
    (folder / kind).mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / kind / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def numbered(count: int) -> list[dict[str, Any]]:
    return [{**ARC, "id": str(i)} for i in range(count)]


def test_the_search_sees_train_and_the_report_test(tmp_path: Path) -> None:
    write(tmp_path, "arc_easy", "train", numbered(3))
    write(tmp_path, "arc_easy", "test", numbered(5))
    splits = load_splits(source("arc_easy", tmp_path))
    assert (len(splits["search"]), len(splits["report"])) == (3, 5)


def test_a_single_split_is_halved_by_rows(tmp_path: Path) -> None:
    write(tmp_path, "arc_easy", "test", numbered(5))
    splits = load_splits(source("arc_easy", tmp_path))
    assert splits["search"]["id"] == ["0", "2", "4"]
    assert splits["report"]["id"] == ["1", "3"]


def test_few_shot_examples_are_not_searched(tmp_path: Path) -> None:
    write(tmp_path, "mmlu", "dev", [MMLU] * 5)
    write(tmp_path, "mmlu", "test", [MMLU] * 4 + [{**MMLU, "subject": "astronomy"}] * 6)
    splits = load_splits(source("mmlu", tmp_path))
    assert (len(splits["dev"]), len(splits["search"]), len(splits["report"])) == (5, 2, 2)


def test_text_with_unicode_line_separators_stays_one_row(tmp_path: Path) -> None:
    write(tmp_path, "arc_easy", "test", [{**ARC, "question": "one\u2028two"}, ARC])
    assert len(load_splits(source("arc_easy", tmp_path))["test"]) == 2


BAD = [
    ("arc_easy", {"question": None}, "field 'question'"),
    ("arc_easy", {"answerKey": "E"}, r"field 'answerKey'.*none of the labels"),
    (
        "arc_easy",
        {"choices": {"text": ["water", " "], "label": ["A", "B"]}},
        r"choices.text\[1\].*empty choice",
    ),
    ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "choices.label"),
    ("arc_easy", {"choices": ["a", "b"]}, "field 'choices'"),
    ("winogrande", {"sentence": "No blank."}, "has no blank"),
    ("winogrande", {"answer": "3"}, "neither '1' nor '2'"),
    ("winogrande", {"option2": 5}, "field 'option2'.*must be text"),
    ("mmlu", {"answer": 4}, "not an index of the 4 choices"),
    ("mmlu", {"answer": "A"}, "not an index"),
    ("mmlu", {"choices": "abcd"}, "field 'choices'"),
    ("truthfulqa_mc", {"mc1_targets": {"choices": ["a", "b"]}}, "field 'mc1_targets'"),
    (
        "truthfulqa_mc",
        {"mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}},
        "first choice the right one",
    ),
    ("truthfulqa_mc", {"mc2_targets": {"choices": ["a", "b"], "labels": [1]}}, "mc2_targets.labels"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD)
def test_a_bad_row_is_named_by_file_line_and_field(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = KINDS[kind][3]
    split = "validation" if kind in ("winogrande", "truthfulqa_mc") else "test"
    write(tmp_path, kind, split, [good, {**good, **change}])
    with pytest.raises(InputError, match=rf"{split}\.jsonl, line 2.*{message}"):
        load_splits(source(kind, tmp_path))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    write(tmp_path, "winogrande", "validation", [{k: v for k, v in WINOGRANDE.items() if k != "option1"}])
    with pytest.raises(InputError, match=r"line 1, field 'option1': is missing"):
        load_splits(source("winogrande", tmp_path))


@pytest.mark.parametrize("line", ["{broken", "[1, 2]"])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path) -> None:
    write(tmp_path, "arc_easy", "test", [ARC, line])
    with pytest.raises(InputError, match="line 2: not"):
        load_splits(source("arc_easy", tmp_path))


def test_absent_local_data_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"arc_easy/<split>\.jsonl.*leave --task-data out"):
        load_splits(source("arc_easy", tmp_path))


def test_no_network_and_no_local_data_says_both_ways() -> None:
    path, name, splits, _ = KINDS["arc_easy"]
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE.*--task-data DIR"):
        load_splits(Source("arc_easy", path, name, splits))
