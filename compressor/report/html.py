"""The report's page, which needs nothing outside itself, and its pictures as PNG beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from compressor.report import analysis, comparison, fronts, layers, wording
from compressor.report.data import Candidate, ReportData, Score, Speed
from compressor.report.style import PALETTE, PNG_DPI, styled

PAGE = "index.html"
Row = dict[str, str]


def report(data: ReportData, folder: Path) -> Path:
    """Write ``index.html`` and the pictures into ``folder`` (made if missing); the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    svgs: dict[str, Markup] = {}
    with styled():
        for name, title, figure in _figures(data):
            figure.savefig(folder / f"{name}.png", dpi=PNG_DPI)
            svgs[name] = inline_svg(figure, title)
    page = folder / PAGE
    page.write_text(render(data, svgs), encoding="utf-8")
    return page


def render(data: ReportData, svgs: dict[str, Markup]) -> str:
    """The page's text; ``svgs`` are the pictures that there are, by name."""
    environment = Environment(
        loader=PackageLoader("compressor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(PAGE).render(
        data=data,
        svgs=svgs,
        wording=wording,
        comparison=comparison,
        headline=wording.headline(data),
        figures=_key_figures(data),
        choices=_choices(data),
        front=[_candidate_row(data, c) for c in analysis.front_candidates(data)],
        candidates=[_candidate_row(data, c) for c in _best_first(data)],
        counts=_counts(data),
        findings=_findings(data),
    )


def inline_svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element: scalable, named for screen readers, coloured by the page's theme."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for name, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{name})")
    label = Markup.escape(title)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def _figures(data: ReportData) -> Iterator[tuple[str, str, Figure]]:
    """(file name, title, figure) of every picture that the data has something to show in."""
    if analysis.evaluated(data) or analysis.evaluated(data, "infeasible"):
        yield "front_size", f"Bytes of weights against {data.accuracy_label}", fronts.size_front(data)
        yield "front_throughput", f"Throughput against {data.accuracy_label}", fronts.throughput_front(data)
        yield "latencies", "Time to first token against time per output token", fronts.latencies(data)
    if data.winner is not None:
        shape = wording.architecture(data.winner.subnet, data.num_layers, data.intermediate_size)
        yield "architecture", f"The winner: {shape}", layers.architecture(data, data.winner.subnet)
    if analysis.front_candidates(data):
        yield "front_layers", "What the sub-networks of the front keep", layers.front_layers(data)
    if any(data.loss_curves.values()):
        yield "loss", "Loss of the fine-tuning", layers.loss_curves(data)


def _key_figures(data: ReportData) -> list[Row]:
    """The winner's figures in large print, each beside the unpruned model's in the same numerics."""
    winner, full = data.winner, data.reference(data.numerics)
    if winner is None:
        return []
    speed, other = winner.speed, full.speed if full else None
    name = f"unpruned {data.numerics.upper()}"
    sizes = f"{name} {wording.size(full.weight_bytes)}" if full else ""
    scores = " · ".join(
        part
        for part in (
            f"95%: {wording.interval(winner.accuracy)}" if wording.interval(winner.accuracy) else "",
            f"{name} {wording.score(full.accuracy)}" if full and full.accuracy else "",
        )
        if part
    )
    times = wording.speed_cells(speed)
    others = wording.speed_cells(other)
    labels = ("time to first token", "time per output token", "throughput")
    return [
        {"label": data.accuracy_label, "value": wording.score(winner.accuracy), "note": scores},
        {"label": "weights", "value": wording.size(winner.weight_bytes), "note": sizes},
        *(
            {"label": label, "value": value, "note": f"{name} {beside}" if other else ""}
            for label, value, beside in zip(labels, times, others, strict=True)
        ),
    ]


def _choices(data: ReportData) -> list[Row]:
    """The winner, then what a user would otherwise pick, measured the same way."""
    full = data.reference("int8")
    base = full.weight_bytes if full else None
    rows = []
    if data.winner is not None:
        w = data.winner
        name = f"winner, {wording.numerics(data.numerics, w.subnet)}"
        rows.append(_choice(name, w.weight_bytes, w.accuracy, w.speed, base))
    return rows + [_choice(r.name, r.weight_bytes, r.accuracy, r.speed, base) for r in data.references]


def _choice(
    name: str,
    weight_bytes: int,
    accuracy: Score | None,
    speed: Speed | None,
    full_bytes: int | None,
) -> Row:
    ttft, tpot, throughput = wording.speed_cells(speed)
    return {
        "name": name,
        "accuracy": wording.score(accuracy),
        "interval": wording.interval(accuracy),
        "weights": wording.size(weight_bytes),
        "ratio": wording.against(weight_bytes, full_bytes),
        "ttft": ttft,
        "tpot": tpot,
        "throughput": throughput,
    }


def _candidate_row(data: ReportData, candidate: Candidate) -> Row:
    ttft, tpot, throughput = wording.speed_cells(candidate.speed)
    return {
        "digest": candidate.subnet.digest[:8],
        "architecture": wording.short_architecture(candidate.subnet, data.intermediate_size),
        "accuracy": wording.score(candidate.accuracy),
        "interval": wording.interval(candidate.accuracy),
        "weights": wording.size(candidate.weight_bytes),
        "ttft": ttft,
        "tpot": tpot,
        "throughput": throughput,
        "status": {"ok": "front" if candidate.on_front else "", "infeasible": "over budget"}.get(
            candidate.status, "failed"
        ),
        "winner": "yes" if data.winner is not None and candidate.subnet == data.winner.subnet else "",
    }


def _best_first(data: ReportData) -> list[Candidate]:
    return sorted(data.candidates, key=lambda c: -(c.accuracy.value if c.accuracy else -1))


def _counts(data: ReportData) -> dict[str, int]:
    found = {status: sum(c.status == status for c in data.candidates) for status in ("infeasible", "failed")}
    front = sum(c.on_front for c in data.candidates)
    return {"evaluated": len(data.candidates), "front": front, **found}


def _findings(data: ReportData) -> list[str]:
    """Sentences about what the front's sub-networks have in common."""
    found = analysis.findings(data)
    if not found.sub_networks:
        return []

    def named(numbers: tuple[int, ...]) -> str:
        return wording.layers_named(analysis.ranges(numbers))

    say = []
    if found.always_kept:
        say.append(f"All of them keep {named(found.always_kept)}.")
    if found.often_dropped:
        say.append(f"Most of them drop {named(found.often_dropped)}.")
    if found.never_kept:
        say.append(f"None of them keeps {named(found.never_kept)}.")
    names = ("first", "middle", "last")
    widths = [
        f"{width:.0%} in the {name} third"
        for name, width in zip(names, found.width_by_third, strict=True)
        if width is not None
    ]
    if widths:
        say.append(f"Mean MLP width of the layers kept: {', '.join(widths)}.")
    return say
