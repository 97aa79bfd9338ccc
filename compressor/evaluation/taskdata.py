"""Where task items come from: checked local JSONL files, or the hub; split for search and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compressor.errors import InputError

Row = dict[str, Any]
Split = Literal["search", "report"]
Check = Callable[[Row], tuple[str, str] | None]
"""What is wrong with a row, as (field, what), or None."""

SPLITS: tuple[Split, ...] = ("search", "report")


@dataclass(frozen=True)
class SplitNames:
    """The split names that lm-eval's definition of a task gives."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None
    fewshot: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set as lm-eval names it, and the folder of ``--task-data`` to read it from, if any."""

    task: str
    path: str
    name: str | None
    splits: SplitNames
    local: Path | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_splits(source: Source) -> dict[str, Any]:
    """All splits of a data set by name (``datasets.Dataset``), with ``search`` and ``report`` added.

    The search may see the train split, or the validation split where lm-eval evaluates on another
    one; where a set has a single split, the search gets its even rows and the report its odd rows.
    Raises ``InputError`` naming file, line and field of bad local data, or both ways to get data.
    """
    splits = _local_splits(source) if source.local is not None else _hub_splits(source)
    named = source.splits
    usable = [s for s in (named.test, named.validation, named.train) if s in splits and s != named.fewshot]
    if not usable:
        raise InputError(
            f"task '{source.task}' evaluates split '{named.test or named.validation}', which its data lacks: "
            f"it has {', '.join(splits) or 'none'}"
        )
    reported = usable[0]
    searched = next((s for s in (named.train, named.validation) if s in usable[1:]), None)
    if searched is not None:
        return {**splits, "search": splits[searched], "report": splits[reported]}
    rows = splits[reported]
    halves = {str(name): rows.select(range(i, len(rows), 2)) for i, name in enumerate(SPLITS)}
    return {**splits, **halves}


def read_rows(path: Path, check: Check | None = None) -> list[Row]:
    """Rows of a JSONL file. Raises ``InputError`` naming file, line and field."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a UTF-8 JSONL file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: not a JSON object")
        if check is not None and (wrong := check(row)) is not None:
            raise InputError(f"{path}, line {number}, field '{wrong[0]}': {wrong[1]}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


@dataclass(frozen=True)
class _Layout:
    """A folder of ``--task-data`` that stands for a hub data set."""

    folder: str
    check: Check
    subject_field: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)


def _local_splits(source: Source) -> dict[str, Any]:
    from datasets import Dataset

    assert source.local is not None
    layout = _layout(source)
    folder = source.local / layout.folder
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".jsonl") if folder.is_dir() else []
    if not files:
        raise InputError(
            f"no data for task '{source.task}': put {source.path} into {folder}/<split>.jsonl, one JSON "
            "object a line with the hub's field names, or leave --task-data out to fetch it from the hub"
        )
    splits = {}
    for file in files:
        rows = _cached_rows(file, layout.check)
        if layout.subject_field is not None:
            rows = [row for row in rows if row[layout.subject_field] == source.name]
        rows = [{layout.rename.get(key, key): value for key, value in row.items()} for row in rows]
        if rows:
            splits[file.stem] = Dataset.from_list(rows)
    return splits


def _hub_splits(source: Source) -> dict[str, Any]:
    from datasets import load_dataset

    try:
        return dict(load_dataset(source.path, source.name, **source.kwargs))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"task '{source.task}' needs the data set {source.path}, which is not on this machine and could "
            f"not be fetched ({reason}): connect to the network with HF_HUB_OFFLINE unset, or give local "
            f"files with --task-data DIR (DIR/{_layout(source).folder}/<split>.jsonl)"
        ) from None


def _layout(source: Source) -> _Layout:
    known = _LAYOUTS.get((source.path, source.name)) or _LAYOUTS.get((source.path, None))
    return known or _Layout(source.path.rsplit("/", 1)[-1], lambda _: None)


_ROWS: dict[tuple[Path, int], list[Row]] = {}


def _cached_rows(file: Path, check: Check) -> list[Row]:
    """Rows read and checked once a process: MMLU's 57 subjects share a file."""
    key = (file, file.stat().st_mtime_ns)
    if key not in _ROWS:
        _ROWS[key] = read_rows(file, check)
    return _ROWS[key]


def _check_arc(row: Row) -> tuple[str, str] | None:
    choices = row.get("choices")
    if wrong := _first_not_text(row, "question", "answerKey"):
        return wrong
    if not isinstance(choices, dict) or set(choices) < {"text", "label"}:
        return "choices", "must hold the lists 'text' and 'label'"
    if wrong := _check_choices(choices["text"], "choices.text"):
        return wrong
    if len(choices["label"]) != len(choices["text"]):
        return "choices.label", "must have one label for each text"
    if row["answerKey"] not in choices["label"]:
        return "answerKey", f"{row['answerKey']!r} is none of the labels {choices['label']}"
    return None


def _check_mmlu(row: Row) -> tuple[str, str] | None:
    if wrong := _first_not_text(row, "question", "subject"):
        return wrong
    if wrong := _check_choices(row.get("choices"), "choices"):
        return wrong
    answer, count = row.get("answer"), len(row["choices"])
    if not isinstance(answer, int) or not 0 <= answer < count:
        return "answer", f"{answer!r} is not an index of the {count} choices"
    return None


def _check_winogrande(row: Row) -> tuple[str, str] | None:
    if wrong := _first_not_text(row, "sentence", "option1", "option2", "answer"):
        return wrong
    if "_" not in row["sentence"]:
        return "sentence", "has no blank '_'"
    if row["answer"] not in ("1", "2"):
        return "answer", f"{row['answer']!r} is neither '1' nor '2'"
    return None


def _check_truthfulqa(row: Row) -> tuple[str, str] | None:
    if wrong := _first_not_text(row, "question"):
        return wrong
    for name in ("mc1_targets", "mc2_targets"):
        targets = row.get(name)
        if not isinstance(targets, dict) or set(targets) < {"choices", "labels"}:
            return name, "must hold the lists 'choices' and 'labels'"
        if wrong := _check_choices(targets["choices"], f"{name}.choices"):
            return wrong
        if len(targets["labels"]) != len(targets["choices"]):
            return f"{name}.labels", "must have one label for each choice"
    if row["mc1_targets"]["labels"][0] != 1:
        return "mc1_targets.labels", "must name the first choice the right one"
    return None


def _first_not_text(row: Row, *names: str) -> tuple[str, str] | None:
    for name in names:
        if name not in row:
            return name, "is missing"
        if not isinstance(row[name], str) or not row[name].strip():
            return name, f"must be text, is {row[name]!r}"
    return None


def _check_choices(choices: object, name: str) -> tuple[str, str] | None:
    if not isinstance(choices, list) or len(choices) < 2:
        return name, "must be a list of two choices or more"
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            return f"{name}[{index}]", f"must be text, is {choice!r}: an empty choice cannot be scored"
    return None


_LAYOUTS: dict[tuple[str, str | None], _Layout] = {
    ("allenai/ai2_arc", "ARC-Easy"): _Layout("arc_easy", _check_arc),
    ("allenai/ai2_arc", "ARC-Challenge"): _Layout("arc_challenge", _check_arc),
    ("allenai/openbookqa", None): _Layout("openbookqa", _check_arc, rename={"question": "question_stem"}),
    ("allenai/winogrande", None): _Layout("winogrande", _check_winogrande),
    ("cais/mmlu", None): _Layout("mmlu", _check_mmlu, subject_field="subject"),
    ("truthfulqa/truthful_qa", None): _Layout("truthfulqa_mc", _check_truthfulqa),
}
