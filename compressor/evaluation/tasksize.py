"""How large known tasks are, without their data: what a plan counts before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SEARCH_ITEMS = 1500
"""Most items of a task that a search scores unless told otherwise: its standard error is then 1.3 points of
accuracy, and what two sub-networks differ by is known better still, since both answer the same items."""


@dataclass(frozen=True)
class TaskSize:
    """A task's items in the search and the report split, and what scoring one takes.

    ``tokens`` of an item that are computed once all choices share their question; ``shared`` by all items
    together (examples, a preamble); ``prompts``: distinct texts of an item, as an engine without trees
    reads them, each ``prompt_tokens`` long.
    """

    search: int
    report: int
    tokens: float
    shared: int = 0
    prompts: float = 4
    prompt_tokens: float = 60

    def items(self, split: str, limit: int | None) -> int:
        """Items that are scored of a split."""
        count, most = (self.search, SEARCH_ITEMS) if split == "search" else (self.report, self.report)
        return min(count, most if limit is None else limit)

    def scored_tokens(self, split: str, limit: int | None) -> float:
        """Tokens of a forward pass over the split in PyTorch."""
        return self.items(split, limit) * self.tokens + self.shared

    def read_tokens(self, split: str, limit: int | None) -> float:
        """Tokens that an engine reads which is sent each distinct prompt once."""
        return self.items(split, limit) * self.prompts * self.prompt_tokens


UNKNOWN = TaskSize(SEARCH_ITEMS, SEARCH_ITEMS, 100, 0, 4, 80)
"""What is assumed of a task that isn't listed."""
KNOWN = {
    "arc_challenge": TaskSize(1119, 1172, 43.5, 0, 3.6, 35),
    "arc_easy": TaskSize(2251, 2376, 36.1, 0, 3.4, 31),
    "mmlu": TaskSize(1531, 14042, 88, 31000, 1, 632),
    "truthfulqa_mc1": TaskSize(409, 408, 50.9, 0, 5, 198),
    "winogrande": TaskSize(40398, 1267, 26.8, 0, 2, 21.4),
}
"""Items as lm-eval's data have them, MMLU with five examples; tokens by the starter's tokenizer."""

_PAPER = ("arc_challenge", "arc_easy", "mmlu", "truthfulqa_mc1", "winogrande")


def sizes(names: Sequence[str]) -> list[TaskSize]:
    """Of every task that the names stand for."""
    single = [task for name in names for task in (_PAPER if name == "paper" else (name,))]
    return [KNOWN.get(name, UNKNOWN) for name in dict.fromkeys(single)]
