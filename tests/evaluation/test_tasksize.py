"""How many items a search scores, which ones, and what a plan counts of tasks whose data it has not seen."""

from __future__ import annotations

from compressor.evaluation.tasks import _rows
from compressor.evaluation.tasksize import KNOWN, SEARCH_ITEMS, UNKNOWN, sizes

WINOGRANDE = [("winogrande", 40398)]
MMLU = [("mmlu", 27), ("mmlu", 100), ("mmlu", 1873)]


def test_a_search_scores_at_most_so_many_items_of_a_task_drawn_by_seed() -> None:
    (rows,) = _rows(WINOGRANDE, "search", None, 1)
    assert len(rows) == SEARCH_ITEMS == len(set(rows)) and list(rows) == sorted(rows)
    assert rows[-1] > 40000, "not the first ones"
    assert _rows(WINOGRANDE, "search", None, 1) == [rows] != _rows(WINOGRANDE, "search", None, 2)


def test_a_groups_tasks_share_them_by_size() -> None:
    counts = [len(rows) for rows in _rows(MMLU, "search", None, 1)]
    assert counts == [20, 75, 1405] and sum(counts) == SEARCH_ITEMS


def test_the_report_scores_all_and_a_limit_is_taken_at_its_word() -> None:
    assert len(_rows(WINOGRANDE, "report", None, 1)[0]) == 40398
    assert _rows(WINOGRANDE, "search", 3, 1) == [(0, 1, 2)]
    assert len(_rows(WINOGRANDE, "search", 5000, 1)[0]) == 5000
    assert _rows([("small", 7)], "search", None, 1) == [tuple(range(7))]


def test_a_plan_counts_every_task_that_a_name_stands_for() -> None:
    assert sizes(("paper",)) == list(KNOWN.values())
    assert sizes(("arc_easy", "mine", "arc_easy")) == [KNOWN["arc_easy"], UNKNOWN]
    large = KNOWN["winogrande"]
    assert (large.items("search", None), large.items("search", 5000)) == (SEARCH_ITEMS, 5000)
    assert large.scored_tokens("search", 20) == 20 * large.tokens
