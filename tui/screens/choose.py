"""Step 5, choose: the front as table, chart, drawing and comparison; a new pick under other budgets."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical, VerticalScroll
from textual.widgets import DataTable, TabbedContent, TabPane

from compressor.errors import CompressorError
from compressor.profile import Budgets
from compressor.report import wording
from compressor.report.data import Score, Speed
from compressor.request import AGREEMENT
from tui import words
from tui.charts import MIB, VIEWS, make_chart
from tui.results import Pick, Results, read_results, reference_samples, sample_of, weight_budget_bytes
from tui.screens.step import Step
from tui.widgets.architecture import Architecture
from tui.widgets.field import Field
from tui.widgets.line import Line
from tui.widgets.scatter import Scatter

TABS = ("chart", "layers", "compare", "what-if")
COLUMNS = (
    "",
    "Accuracy\n%, ± 95%",
    "Weights\nMiB",
    "Memory\nMiB",
    "First\nms",
    "Each\nms",
    "Speed\ntok/s",
    "Budgets\nM F E",
    "Layers\n",
)
COMPARED = ("Model", "Accuracy %", "MiB", "First ms", "Each ms", "tok/s")
SORTS = (
    ("accuracy", lambda p: -(p.candidate.accuracy.value if p.candidate.accuracy else 0)),
    ("weights", lambda p: p.candidate.weight_bytes),
    ("first token", lambda p: p.candidate.speed.ttft_ms if p.candidate.speed else 0),
    ("each token", lambda p: p.candidate.speed.tpot_ms if p.candidate.speed else 0),
    ("speed", lambda p: -(p.candidate.speed.throughput_tok_s if p.candidate.speed else 0)),
)
WHAT_IF = (
    ("Memory", "memory_gib", "GiB"),
    ("First token in", "ttft_ms", "ms"),
    ("Each token in", "tpot_ms", "ms"),
)


class ChooseStep(Step):
    """Pick one of the front; the run's own choice is marked."""

    step = "choose"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("o", "sort", "Sort"),
        ("v", "view", "Chart"),
        *((str(n + 1), f"tab('{name}')", "") for n, name in enumerate(TABS)),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.results: Results | None = None
        self.written = 0.0
        self.picks: list[Pick] = []
        self.sort = 0
        self.view = VIEWS[0]
        self.budgets: Budgets | None = None
        self.also: str | None = None

    def content(self) -> ComposeResult:
        with Vertical(id="choose-top"):
            yield Line("", id="choose-title", classes="heading")
            yield DataTable(id="table", cursor_type="row", zebra_stripes=True, header_height=2)
        with TabbedContent(id="tabs", initial="chart"):
            with TabPane("1 Chart", id="chart"):
                yield Scatter()
            with TabPane("2 Layers", id="layers"):
                yield Architecture()
            with TabPane("3 Compare", id="compare"), VerticalScroll():
                yield Line("", id="tests", markup=False)
            with TabPane("4 What if", id="what-if"):
                for label, name, unit in WHAT_IF:
                    yield Field(label, name, kind="number", unit=unit)
                yield Line("", id="verdict", markup=False)

    def on_mount(self) -> None:
        self.query_one("#table", DataTable).add_columns(*COLUMNS)

    def refresh_facts(self) -> None:
        run = self.wizard.choices.run
        shape = self.wizard.model.shape if self.wizard.model else None
        if run is None:
            self.say("There is no run yet: start one in the plan, or open one with Ctrl+O.", "warning")
            return
        if self.results is not None and (self.results.run, self.results.shape) == (run, shape):
            self._reread_if_written()
            return
        self._read()

    def obstacle(self) -> str:
        if self.selected is None:
            return "choose a sub-network first"
        self.wizard.pick = self.selected
        return ""

    @property
    def selected(self) -> Pick | None:
        """The pick that the table's cursor is on."""
        row = self.query_one("#table", DataTable).cursor_row
        return self.picks[row] if 0 <= row < len(self.picks) else None

    def action_sort(self) -> None:
        self.sort = (self.sort + 1) % len(SORTS)
        self._fill_table(self.selected.digest if self.selected else None)

    def action_view(self) -> None:
        self.view = VIEWS[1 - VIEWS.index(self.view)]
        self._show_selected()

    def action_tab(self, name: str) -> None:
        self.query_one(TabbedContent).active = name
        if name == "what-if":
            self.query_one("#input-memory_gib").focus()
        else:
            self.query_one("#table").focus()

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        if event.data_table.id == "table":
            self._show_selected()

    def on_data_table_row_selected(self) -> None:
        self.action_next()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        columns = {1: 0, 2: 1, 4: 2, 5: 3, 6: 4}
        if event.data_table.id == "table" and event.column_index in columns:
            self.sort = columns[event.column_index]
            self._fill_table(self.selected.digest if self.selected else None)

    def on_field_changed(self, event: Field.Changed) -> None:
        self.say(event.error, "error")
        if not event.error:
            self._pick_again()

    def _read(self) -> None:
        run, model = self.wizard.choices.run, self.wizard.model
        assert run is not None
        try:
            self.results = read_results(run, model.shape if model else None)
        except CompressorError as error:
            self.results, self.picks = None, []
            self.query_one("#table", DataTable).clear()
            self.say(str(error), "error")
            return
        self.written = self._modified()
        self.say("")
        own = self.results.request.profile.budgets.model_dump()
        for _, name, _ in WHAT_IF:
            self.query_one(f"#field-{name}", Field).show(own[name])
        self.budgets, self.also = None, None
        self._fill_table(self.results.winner_digest)
        self.query_one("#verdict", Line).update("Change a budget: the best of what was evaluated is picked.")
        self.query_one("#table").focus()

    def _reread_if_written(self) -> None:
        """Read the results again if the run wrote new ones since."""
        if self._modified() != self.written:
            self._read()

    def _modified(self) -> float:
        assert self.results is not None
        path = self.results.run / "front.json"
        return path.stat().st_mtime if path.exists() else 0.0

    def _fill_table(self, selected: str | None) -> None:
        assert self.results is not None
        name, key = SORTS[self.sort]
        self.picks = sorted(self.results.picks(self.budgets, self.also), key=key)
        table = self.query_one("#table", DataTable)
        table.clear()
        for pick in self.picks:
            table.add_row(*cells(pick, self.results.data.num_layers), key=pick.digest)
        data = self.results.data
        self.query_one("#choose-title", Line).update(
            f"{data.model} on {data.profile}: {len(self.picks)} best of {len(data.candidates)}, by {name}"
        )
        digests = [pick.digest for pick in self.picks]
        if selected in digests:
            table.move_cursor(row=digests.index(selected))
        self._show_selected()

    def _show_selected(self) -> None:
        results, pick = self.results, self.selected
        if results is None or pick is None:
            return
        data = results.data
        self.query_one(Architecture).show(pick.candidate.subnet, data.num_layers, data.intermediate_size)
        self.query_one(Scatter).show(
            make_chart(
                self.view,
                "Agreement" if data.task == AGREEMENT else "Accuracy",
                [sample_of(c) for c in data.candidates if c.status != "failed"],
                reference_samples(data),
                [sample_of(pick.candidate)],
                weight_budget_bytes(results.request, self.wizard.model),
            )
        )
        self._compare(pick)

    def _compare(self, pick: Pick) -> None:
        assert self.results is not None
        data = self.results.data
        own = pick.candidate
        rows = [COMPARED, comparison("this one", own.accuracy, own.weight_bytes, own.speed)]
        rows += [comparison(r.name, r.search_accuracy, r.weight_bytes, r.speed) for r in data.references]
        lines = [aligned(row) for row in rows] + [""]
        whole = data.reference(data.numerics)
        if whole is not None:
            ratio = whole.weight_bytes / own.weight_bytes
            lines.append(f"{ratio:.2f}× smaller than the whole model in {data.numerics.upper()}.")
        if pick.chosen and data.winner is not None:
            score = data.winner.accuracy
            lines.append(
                f"On unseen items: {words.percent(score.value)} ({words.interval(score.low, score.high)})."
            )
            lines += [*wording.beside_free(data), *wording.about_winner(data.winner)]
        self.query_one("#tests", Line).update("\n".join(lines))

    def _pick_again(self) -> None:
        """What the run's rule picks under the budgets in the fields; the cursor goes there."""
        fields = {name: self.query_one(f"#field-{name}", Field).value for _, name, _ in WHAT_IF}
        verdict = self.query_one("#verdict", Line)
        if self.results is None or None in fields.values():
            verdict.update("Give all three budgets.")
            return
        self.budgets = Budgets(**{name: float(value or 0) for name, value in fields.items()})
        answer = self.results.what_if(self.budgets)
        self.also = answer.digest
        self._fill_table(answer.digest or (self.selected.digest if self.selected else None))
        same = answer.digest == self.results.winner_digest
        picked = (
            "The run's own choice (★)." if same else "Picked in the table; it is not the run's own choice."
        )
        verdict.update(answer.text or picked)


def cells(pick: Pick, num_layers: int) -> tuple[str, ...]:
    """A line of the table."""
    candidate = pick.candidate
    return (
        "★" if pick.chosen else " ",
        accuracy_cell(candidate.accuracy),
        words.significant(candidate.weight_bytes / MIB),
        words.MISSING if pick.memory_bytes is None else words.significant(pick.memory_bytes / MIB),
        *speed_cells(candidate.speed),
        " ".join("✓" if met else "✗" for met in pick.met),
        f"{candidate.subnet.depth}/{num_layers}",
    )


def accuracy_cell(score: Score | None) -> str:
    """``93.0 ± 2.0``: percent and half of its interval."""
    if score is None:
        return words.MISSING
    if score.low is None or score.high is None:
        return f"{100 * score.value:.1f}"
    return f"{100 * score.value:.1f} ± {50 * (score.high - score.low):.1f}"


def comparison(name: str, score: Score | None, weight_bytes: int, speed: Speed | None) -> tuple[str, ...]:
    """A line of the comparison; the score is on the search split for all of them."""
    return (
        name,
        accuracy_cell(score),
        words.significant(weight_bytes / MIB),
        *speed_cells(speed),
    )


def aligned(row: tuple[str, ...]) -> str:
    """A line of the comparison with its cells under each other."""
    name, *figures = row
    widths = (12, 9, 10, 9, 9)
    cells = (f"{figure:>{width}}" for figure, width in zip(figures, widths, strict=True))
    return f"{name:<26}" + "".join(cells)


def speed_cells(speed: Speed | None) -> tuple[str, ...]:
    """First token and each token in ms, output tokens/s."""
    if speed is None:
        return (words.MISSING,) * 3
    return tuple(words.significant(v) for v in (speed.ttft_ms, speed.tpot_ms, speed.throughput_tok_s))
