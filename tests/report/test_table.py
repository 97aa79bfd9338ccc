"""The terminal's table: the winner beside what a user would otherwise pick."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from compressor.report.data import ReportData
from compressor.report.table import summary_table
from tests.report.sample import make_report_data


def printed(data: ReportData, width: int = 130) -> str:
    stream = io.StringIO()
    Console(width=width, file=stream).print(summary_table(data))
    return stream.getvalue()


def test_winner_and_references_with_units() -> None:
    text = printed(make_report_data(60))
    rows = [line for line in text.splitlines() if "│" in line]
    assert "winner, INT8" in rows[0]
    assert [name for name in ("bf16", "INT8", "INT4") if any(f"unpruned, {name}" in row for row in rows)] == [
        "bf16",
        "INT8",
        "INT4",
    ]
    assert "smaller" in rows[0] and "(tok/s)" in text and "agreement" in text
    assert "Memory: 0.1" in text and "GiB of 0.125 GiB, met" in text
    sentences = " ".join(text.split())
    assert "Significantly worse than the unpruned model in INT8" in sentences
    assert (
        "the winner takes 78.4% (76.8 to 80.0%) of its time to first token and 81.2% (80.1 to 82.3%)"
        in sentences
    )


def test_a_winner_with_layers_of_fewer_bits_is_not_called_int8() -> None:
    data = make_report_data(60)
    assert data.winner is not None
    subnet = data.winner.subnet
    for first, name in ((8, "layers of 4 or 8 bits"), (4, "layers of 4 bits")):
        bits = (first, *[4] * (subnet.depth - 1))
        winner = replace(data.winner, subnet=replace(subnet, bits=bits))
        assert f"winner, {name}" in " ".join(printed(replace(data, winner=winner), width=160).split())


def test_no_winner_and_markup_in_names() -> None:
    data = replace(make_report_data(0), model="me/[bold]model", notes=("Nearest: [red] 0.131 GiB.",))
    text = printed(data)
    assert "No sub-network of me/[bold]model" in text
    assert "Nearest: [red] 0.131 GiB." in text
    assert "winner" not in text


def test_it_fits_a_narrow_terminal() -> None:
    assert all(len(line) <= 80 for line in printed(make_report_data(30), width=80).splitlines())
