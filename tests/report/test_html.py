"""The page stands alone and tells the truth, with one candidate or three hundred, or none."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compressor.report.data import Candidate, Reference, ReportData, Score, Speed
from compressor.report.html import report
from compressor.report.style import PALETTE
from compressor.space import SubNetwork
from tests.report.sample import make_report_data

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PICTURES = {"front_size", "front_throughput", "latencies", "architecture", "front_layers", "loss"}
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects the page's text and what it points at; raises on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.rows = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.rows += tag == "tr"
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(data: ReportData, folder: Path) -> tuple[str, Page]:
    text = report(data, folder).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    return text, page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportData, Path, str, Page]:
    data = make_report_data(60)
    folder = tmp_path_factory.mktemp("report") / "nested" / "report"
    return (data, folder, *written(data, folder))


def test_the_page_needs_nothing_outside_itself(whole: tuple[ReportData, Path, str, Page]) -> None:
    _, _, text, page = whole
    assert all(link.startswith("#") for link in page.links), "an outside resource"
    assert "<script" not in text and "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_pictures_are_written_and_inlined(whole: tuple[ReportData, Path, str, Page]) -> None:
    _, folder, text, _ = whole
    assert {path.stem for path in folder.glob("*.png")} == PICTURES
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(PNG_MAGIC) and path.stat().st_size > 5_000
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == len(PICTURES)
    for svg in svgs:
        root = ET.fromstring(svg)
        assert root.get("aria-label") and root.get("viewBox") and root.get("width") is None


def test_pictures_take_the_colours_of_the_theme(whole: tuple[ReportData, Path, str, Page]) -> None:
    text = whole[2]
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not any(colour in svgs for colour in PALETTE.values())
    assert "#000000" not in svgs, "black vanishes on a dark page"
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = style.split("prefers-color-scheme: dark")
    for name in set(re.findall(r"var\((--[\w-]+)\)", svgs + style)):
        assert f"{name}:" in light and f"{name}:" in dark, name


def test_figures_of_winner_and_references_are_on_the_page(whole: tuple[ReportData, Path, str, Page]) -> None:
    data, _, _, page = whole
    assert data.winner is not None
    assert f"{data.winner.weight_bytes / 1e6:.1f} MB" in page.text
    assert f"{100 * data.winner.accuracy.value:.1f}%" in page.text
    for reference in data.references:
        assert reference.name in page.text
    assert "1.78× larger" in page.text
    assert "Significantly worse than the unpruned model in INT8" in page.text
    for _, command in data.next_commands:
        assert command in page.text
    assert "Time to first token 1,500 ms" in page.text and "to spare" in page.text
    assert "2.13.0+cpu" in page.text


def test_every_candidate_is_listed(whole: tuple[ReportData, Path, str, Page]) -> None:
    data, _, _, page = whole
    assert all(c.subnet.digest[:8] in page.text for c in data.candidates)
    failed = sum(c.status == "failed" for c in data.candidates)
    assert failed and f"{failed} failed" in page.text


@pytest.mark.parametrize("count", [1, 300])
def test_any_number_of_candidates(count: int, tmp_path: Path) -> None:
    text, page = written(make_report_data(count, seed=count), tmp_path)
    assert f"{count} sub-network{'s' * (count > 1)} evaluated" in page.text
    assert page.rows > count
    assert len(text) < 2_000_000


def test_a_run_that_found_nothing_says_so(tmp_path: Path) -> None:
    data = replace(
        make_report_data(0), winner=None, notes=("Nearest: 0.131 GiB, 5% over the memory budget.",)
    )
    data = replace(data, loss_curves={}, next_commands=())
    _, page = written(data, tmp_path)
    assert "No sub-network of SmolLM2-135M-Instruct meets the budgets" in page.text
    assert "Nearest: 0.131 GiB" in page.text
    assert not list(tmp_path.glob("*.png"))


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    data = replace(make_report_data(3), model="<script>alert(1)</script>", notes=("a <b> & c",))
    text, page = written(data, tmp_path)
    assert "<script" not in text
    assert "a <b> & c" in page.text


def test_lm_eval_tasks_gigabytes_and_bits(tmp_path: Path) -> None:
    subnet = SubNetwork((0, 2, 3), (64, 32, 64), (8, 4, 8))
    data = replace(
        make_report_data(0),
        task="arc_easy",
        num_layers=4,
        intermediate_size=64,
        candidates=(Candidate(subnet, 5_000_000_000, Score(0.7), Speed(90, 20, 48), "ok", True),),
        references=(
            Reference("unpruned, INT8", "int8", 7_000_000_000, Score(0.72), None, Speed(120, 28, 35)),
        ),
        weight_budget_bytes=6_000_000_000,
    )
    _, page = written(data, tmp_path)
    assert "Arc_easy accuracy" in page.text
    assert "3 layers, 83% wide, 1 in 4 bits" in page.text
    assert "5.00 GB" in page.text


def test_the_same_data_gives_the_same_page(tmp_path: Path) -> None:
    data = make_report_data(12)
    first, _ = written(data, tmp_path / "a")
    second, _ = written(data, tmp_path / "b")
    assert first == second
