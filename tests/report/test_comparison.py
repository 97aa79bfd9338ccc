"""A comparison with other pruning methods, in a terminal of 80 columns and on the page."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from compressor.report.comparison import comparison_table
from compressor.report.data import Compared, Comparison, PairedTest, Score, SideBySide
from compressor.report.html import report
from tests.report.sample import make_report_data

BETTER = PairedTest("SliceGPT", 0.0001, 30, 2)
COMPARISON = Comparison(
    "tiny",
    "agreement",
    "float32",
    (
        Compared("unpruned", 134_500_000, Score(1.0, 0.89, 1.0, 4992)),
        Compared(
            "sub-network",
            120_400_000,
            Score(0.745, 0.72, 0.77, 4992),
            Score(0.692, 0.67, 0.71, 4992),
            SideBySide(0.9, 0.1),
            SideBySide(0.88, 0.02),
            16.5,
        ),
        Compared("SliceGPT", 120_000_000, Score(0.65, 0.63, 0.67, 4992), tuned_minutes=18.5, test=BETTER),
    ),
)


def test_the_table_fits_80_columns_and_cuts_no_word() -> None:
    stream = io.StringIO()
    Console(width=80, file=stream).print(comparison_table(COMPARISON))
    text = stream.getvalue()
    assert "…" not in text and all(len(line) <= 80 for line in text.splitlines())
    (row,) = (line for line in text.splitlines() if "sub-network" in line and "│" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("sub-network", "120.4M", "69.2%", "74.5%", "0.90", "0.88", "16.5")
    ]
    assert "(89.5%)" in text and "± 0.09" in text
    said = " ".join(text.split())
    assert "significantly better than SliceGPT" in said and "30 items only the sub-network has right" in said


def test_the_page_has_the_same_rows_and_remarks(tmp_path: Path) -> None:
    data = replace(make_report_data(6), comparisons=(COMPARISON,))
    page = report(data, tmp_path).read_text()
    assert "Beside other pruning methods" in page and '<td class="n">0.90 ± 0.09</td>' in page
    assert "significantly better than SliceGPT" in page
    assert "Beside other pruning methods" not in report(make_report_data(6), tmp_path).read_text()
