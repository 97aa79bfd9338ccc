"""What the verdict says of the winner beside what anybody has for free."""

from __future__ import annotations

from dataclasses import replace

from compressor.report import wording
from compressor.report.data import PairedTest, Reference, Score, Winner
from compressor.space import SubNetwork
from tests.report.sample import make_report_data

DATA = make_report_data()
FULL = SubNetwork((0, 1), (64, 64), (4, 4), (4, 4))
assert DATA.winner is not None
WINNER: Winner = DATA.winner


def rival(accuracy: float, size: int, within: bool | None = True, name: str = "unpruned, INT4") -> Reference:
    return Reference(name, "int4", size, Score(accuracy), within_budgets=within)


def said(winner: Winner, *references: Reference) -> str:
    return " ".join(wording.beside_free(replace(DATA, winner=winner, references=references)))


def test_the_strongest_rival_within_the_budgets_is_named() -> None:
    winner = replace(WINNER, weight_bytes=100, accuracy=Score(0.8), tests=())
    text = said(
        winner, rival(0.7, 100), rival(0.75, 90, name="unpruned, INT8"), rival(0.99, 90, within=False)
    )
    assert text.startswith("Beside the unpruned model in INT8, the strongest that is free within the budgets")
    assert "5.0 points more accurate" in text and "but 11% larger" in text


def test_a_winner_that_is_no_better_is_told_so() -> None:
    tie = PairedTest("the unpruned model in INT4", 0.4, 10, 8)
    winner = replace(WINNER, weight_bytes=100, accuracy=Score(0.71), tests=(tie,))
    text = said(winner, rival(0.7, 100))
    assert "has nothing to offer: as far as the items tell it is as accurate, at the same bytes" in text
    assert "Try more minutes, or another budget." in text
    assert "is 50% smaller" in said(replace(winner, weight_bytes=50), rival(0.7, 100))


def test_nothing_is_said_where_nothing_is_known_and_that_nothing_fits_where_it_is() -> None:
    winner = replace(WINNER, free=False)
    assert said(winner, rival(0.7, 100, within=None)) == ""
    assert said(winner, rival(0.7, 100, within=False)) == "No form of the unpruned model meets the budgets."


def test_a_winner_that_is_free_is_the_first_thing_said() -> None:
    free = replace(WINNER, subnet=FULL, free=True)
    data = replace(DATA, winner=free)
    assert wording.headline(data).startswith("nothing found beats the unpruned model in INT4, which is free")
    assert wording.beside_free(data) == []
