"""lm-eval tasks by name: found, checked and loaded for one split, with each one's weight in the mean."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import InputError
from compressor.evaluation.taskdata import Source, Split, SplitNames, load_splits
from compressor.evaluation.tasksize import SEARCH_ITEMS

PRESETS: dict[str, dict[str, int | None]] = {
    "paper": {
        "arc_challenge": None,
        "arc_easy": None,
        "mmlu": 5,
        "truthfulqa_mc1": None,
        "winogrande": None,
    },
}
"""Named sets of tasks, each with its few-shot count (None: the task's own).

``paper``: the five of LLaMA-NAS (arXiv 2405.18377), MMLU with the customary five examples.
"""

METRICS = ("acc", "acc_norm", "exact_match")
"""What an item's value is taken from, the first that the task has."""

_COMMON_FOLDERS = ("arc", "hellaswag", "mmlu/default", "openbookqa", "piqa", "truthfulqa", "winogrande")


@dataclass(frozen=True)
class LoadedTask:
    """A task without children, ready for requests.

    ``rows`` are the numbers of the items to be scored, ascending; ``weight`` is the task's share of its
    top-level name's mean.
    """

    name: str
    task: Any
    metric: str
    rows: tuple[int, ...]
    weight: float

    @property
    def num_fewshot(self) -> int:
        return self.task.config.num_fewshot or 0


@dataclass(frozen=True)
class _Leaf:
    name: str
    overrides: dict[str, Any]
    yaml_path: Path | None
    num_fewshot: int | None
    unit: str
    by_size: bool


def parse_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Task names from a comma list or sequence, presets kept by name. Raises ``InputError``."""
    parts = names.split(",") if isinstance(names, str) else names
    stripped = tuple(dict.fromkeys(name.strip() for name in parts if name.strip()))
    if not stripped:
        raise InputError("no task named: give --tasks NAME[,NAME...] or --tasks paper")
    return stripped


def check_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names, each known to lm-eval or a preset. Raises ``InputError`` with the nearest ones."""
    parsed = parse_names(names)
    index = _index([task for name in parsed for task in PRESETS.get(name, {name: None})])
    for name in parsed:
        if name not in PRESETS and name not in index:
            near = get_close_matches(name, [*PRESETS, *index], 3) or ["paper", "arc_easy"]
            raise InputError(f"unknown task '{name}': did you mean {', '.join(near)}?")
    return parsed


def load_tasks(
    names: str | Sequence[str],
    split: Split,
    task_data: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> list[LoadedTask]:
    """The tasks that the names stand for, their items those of ``split``.

    ``num_fewshot`` overrides a task's own count except where its definition fixes it at 0, as lm-eval
    does; ``limit`` bounds each task's items to its first ones. Without it the search split of a name has at
    most ``SEARCH_ITEMS``, drawn by ``seed`` as the examples are. Every top-level name weighs
    the same; within a group, tasks weigh as the group says (MMLU: by size). Raises ``InputError``.
    """
    if task_data is not None and not task_data.is_dir():
        raise InputError(f"no folder {task_data}: --task-data takes a folder of <data set>/<split>.jsonl")
    leaves = _leaves(check_names(names), num_fewshot)
    with _quiet():
        built = [(leaf, _build(leaf, split, task_data, seed)) for leaf in leaves]
    rows = _rows([(leaf.unit, len(task.eval_docs)) for leaf, task in built], split, limit, seed)
    loaded = []
    for (leaf, task), mine in zip(built, rows, strict=True):
        siblings = [len(n) for (other, _), n in zip(built, rows, strict=True) if other.unit == leaf.unit]
        weight = len(mine) / sum(siblings) if leaf.by_size else 1 / len(siblings)
        loaded.append(LoadedTask(leaf.name, task, _metric(leaf.name, task), mine, weight))
    return loaded


def _rows(
    counts: Sequence[tuple[str, int]], split: Split, limit: int | None, seed: int
) -> list[tuple[int, ...]]:
    """Which items are scored, for tasks given as (top-level name, items): a name's share falls on its tasks
    by their size, at least one on each."""
    totals = Counter[str]()
    for unit, count in counts:
        totals[unit] += count
    chosen = []
    for number, (unit, count) in enumerate(counts):
        if limit is not None or split != "search" or totals[unit] <= SEARCH_ITEMS:
            chosen.append(tuple(range(min(count, limit or count))))
            continue
        kept = min(count, max(1, round(count * SEARCH_ITEMS / totals[unit])))
        drawn = np.random.default_rng([seed, number]).permutation(count)[:kept]
        chosen.append(tuple(sorted(drawn.tolist())))
    return chosen


def _leaves(names: tuple[str, ...], num_fewshot: int | None) -> list[_Leaf]:
    wanted: dict[str, int | None] = {}
    for name in names:
        wanted |= PRESETS.get(name, {name: None})
    index = _index(list(wanted))
    leaves: dict[str, _Leaf] = {}
    for name, shots in wanted.items():
        chosen = shots if num_fewshot is None else num_fewshot
        for leaf in _expand(index, name, {}, chosen, name, by_size=False):
            leaves.setdefault(leaf.name, leaf)
    return list(leaves.values())


def _expand(
    index: dict[str, Any],
    name: str,
    overrides: dict[str, Any],
    shots: int | None,
    unit: str,
    by_size: bool,
) -> Iterator[_Leaf]:
    from lm_eval.tasks._index import Kind

    entry = index.get(name)
    if entry is None:
        raise InputError(f"task '{unit}' refers to '{name}', which lm-eval does not know")
    if entry.kind == Kind.TAG:
        for child in sorted(entry.tags):
            yield from _expand(index, child, overrides, shots, unit, by_size)
    elif entry.kind == Kind.GROUP:
        aggregates = entry.cfg.get("aggregate_metric_list") or []
        aggregates = aggregates if isinstance(aggregates, list) else [aggregates]
        sized = any(a.get("weight_by_size", True) for a in aggregates)
        for child in entry.cfg["task"]:
            own = {} if isinstance(child, str) else dict(child)
            child_name = child if isinstance(child, str) else own.pop("task", own.pop("group", None))
            yield from _expand(index, child_name, {**overrides, **own}, shots, unit, sized)
    elif entry.kind == Kind.PY_TASK:
        raise InputError(f"task '{name}' is written in Python, not YAML: only YAML tasks can be split")
    else:
        yield _Leaf(name, overrides, entry.yaml_path, shots, unit, by_size)


def _build(leaf: _Leaf, split: Split, task_data: Path | None, seed: int) -> Any:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = deepcopy(load_yaml(leaf.yaml_path, resolve_func=True)) | leaf.overrides
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    kind = config.get("output_type", "generate_until")
    if kind not in ("multiple_choice", "loglikelihood"):
        raise InputError(
            f"task '{leaf.name}' is of type {kind}: only multiple_choice and loglikelihood tasks have an "
            "accuracy to search by"
        )
    names = SplitNames(
        config.get("training_split"),
        config.get("validation_split"),
        config.get("test_split"),
        config.get("fewshot_split"),
    )
    source = Source(
        leaf.name,
        config["dataset_path"],
        config.get("dataset_name"),
        names,
        task_data,
        config.get("dataset_kwargs") or {},
    )
    splits = load_splits(source)
    config |= {
        "task": leaf.name,
        "custom_dataset": lambda **_: splits,
        "dataset_kwargs": None,
        "training_split": names.train if names.train in splits else None,
        "validation_split": None,
        "test_split": split,
        "num_fewshot": _shots(config, leaf.num_fewshot),
    }
    if config["num_fewshot"] and names.fewshot not in splits and "fewshot_config" not in config:
        config["fewshot_split"] = "search"
    try:
        task = ConfigurableTask(config=config)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"task '{leaf.name}': its data do not fit its definition ({error})") from error
    task.set_fewshot_seed(seed)
    return task


def _shots(config: dict[str, Any], wanted: int | None) -> int:
    own = config.get("num_fewshot")
    return own or 0 if wanted is None or own == 0 else wanted


def _metric(name: str, task: Any) -> str:
    metrics = [m["metric"] for m in task.config.metric_list or []] or list(task._metric_fn_list)
    for metric in METRICS:
        if metric in metrics:
            return metric
    raise InputError(
        f"task '{name}' measures {', '.join(map(str, metrics))}, none of {', '.join(METRICS)}: choose a task "
        "with an accuracy"
    )


def _index(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's registry: of the common folders if they hold every name, else of all (seconds)."""
    for common in (True, False):
        index = _INDEXES.get(common) or _read_index(common)
        _INDEXES[common] = index
        if all(name in index for name in names):
            return index
    return index


_INDEXES: dict[bool, dict[str, Any]] = {}


def _read_index(common: bool) -> dict[str, Any]:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / folder) for folder in _COMMON_FOLDERS]
    with _quiet():
        manager = lm_eval.tasks.TaskManager(
            include_defaults=not common, include_path=folders if common else None
        )
    index: dict[str, Any] = manager.task_index
    return index


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's advice about its own settings is not for our users."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
