"""Figures and verdicts as words, the same on the page, in the table and in the pictures."""

from __future__ import annotations

from compressor.report.data import (
    Budget,
    PairedTest,
    Reference,
    ReportData,
    Score,
    SideBySide,
    Speed,
    Winner,
)
from compressor.space import SubNetwork

SIGNIFICANCE = 0.05
NOTEWORTHY = 0.03
"""Share by which bytes must differ to be said."""
BUDGET_NAMES = {"memory_gib": "Memory", "ttft_ms": "Time to first token", "tpot_ms": "Time per output token"}
BUDGET_UNITS = {"memory_gib": "GiB", "ttft_ms": "ms", "tpot_ms": "ms"}
MISSING = "–"


def size(count: float | None) -> str:
    """Bytes in decimal units, three significant figures or so: ``118.4 MB``, ``6.74 GB``."""
    if count is None:
        return MISSING
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def score(value: Score | None) -> str:
    return MISSING if value is None else percent(value.value)


def interval(value: Score | None) -> str:
    """The 95% interval alone: ``58.1 to 64.3%``; empty where none is known."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{100 * value.low:.1f} to {100 * value.high:.1f}%"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{significant(value)} ms"


def rate(value: float | None) -> str:
    return MISSING if value is None else f"{significant(value)} tok/s"


def speed_cells(speed: Speed | None) -> tuple[str, str, str]:
    """TTFT, TPOT and throughput, each with its unit."""
    if speed is None:
        return MISSING, MISSING, MISSING
    return milliseconds(speed.ttft_ms), milliseconds(speed.tpot_ms), rate(speed.throughput_tok_s)


def significant(value: float) -> str:
    """Three significant figures without an exponent: ``0.118``, ``41.2``, ``1,240``."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def ratio(larger: float, smaller: float) -> str:
    return f"{larger / smaller:.2f}×" if smaller else MISSING


def against(count: int, full: int | None) -> str:
    """Bytes beside those of the whole model: ``1.29× smaller``, ``1.78× larger``, ``the same``."""
    if not full or not count:
        return MISSING
    if abs(full - count) < 0.005 * full:
        return "the same"
    return f"{ratio(full, count)} smaller" if count < full else f"{ratio(count, full)} larger"


def workload(data: ReportData) -> str:
    """``128 prompt + 64 output tokens, 1 request at once``."""
    w = data.workload
    requests = "1 request" if w.concurrency == 1 else f"{w.concurrency} requests"
    return f"{w.prompt_tokens:,} prompt + {w.output_tokens:,} output tokens, {requests} at once"


def budget_figure(budget: Budget, value: float | None) -> str:
    return MISSING if value is None else f"{significant(value)} {BUDGET_UNITS[budget.name]}"


def budget_verdict(budget: Budget) -> str:
    """``met, 12% to spare`` or ``missed by 8%``."""
    if budget.measured is None:
        return "not measured"
    gap = abs(budget.limit - budget.measured) / budget.limit
    return f"met, {gap:.0%} to spare" if budget.met else f"missed by {gap:.0%}"


def architecture(subnet: SubNetwork, num_layers: int, intermediate_size: int) -> str:
    """``26 of 30 layers, 81% of their MLPs' width``, and the bits where some have 4."""
    width = sum(subnet.widths) / (intermediate_size * max(1, subnet.depth))
    text = f"{subnet.depth} of {num_layers} layers, {width:.0%} of their MLPs' width"
    four = sum(bits == 4 for bits in subnet.bits)
    if not four:
        return text
    return f"{text}, {'one layer' if four == 1 else f'{four} layers'} in 4 bits"


def short_architecture(subnet: SubNetwork, intermediate_size: int) -> str:
    """The same for a table's cell: ``26 layers, 81% wide``."""
    width = sum(subnet.widths) / (intermediate_size * max(1, subnet.depth))
    four = sum(bits == 4 for bits in subnet.bits)
    return f"{subnet.depth} layers, {width:.0%} wide" + (f", {four} in 4 bits" if four else "")


def layers_named(numbers: str) -> str:
    """``layer 21`` or ``layers 0 to 16, 26 to 29``, of what ``analysis.ranges`` wrote."""
    return f"layer {numbers}" if numbers.isdigit() else f"layers {numbers}"


def paired_test(test: PairedTest, winner: str = "the winner") -> str:
    """What McNemar's test says, and no more than it says."""
    figures = f"p = {test.p_value:.3f}" if test.p_value >= 0.001 else "p < 0.001"
    counts = f"{test.gained} items only {winner} has right, {test.lost} only {test.against}"
    if test.p_value >= SIGNIFICANCE:
        return f"No significant difference from {test.against} (McNemar, {figures}; {counts})."
    verdict = "better" if test.gained > test.lost else "worse"
    return f"Significantly {verdict} than {test.against} (McNemar, {figures}; {counts})."


def beside_unpruned(winner: Winner) -> list[str]:
    """How much faster the winner is than the unpruned model in INT8, where they were measured in turns."""
    if winner.ttft_beside is None or winner.tpot_beside is None:
        return []
    return [
        "In turns with the unpruned model in INT8, the winner takes "
        f"{_times(winner.ttft_beside)} of its time to first token "
        f"and {_times(winner.tpot_beside)} of its time per output token."
    ]


def _times(beside: SideBySide) -> str:
    low, high = (beside.ratio * (1 + sign * beside.half_interval) for sign in (-1, 1))
    return f"{percent(beside.ratio)} ({100 * low:.1f} to {100 * high:.1f}%)"


def about_winner(winner: Winner) -> list[str]:
    """What its figures alone do not say: tests and measurements that pair it with the unpruned model."""
    return [*tuned_alone(winner), *map(paired_test, winner.tests), *beside_unpruned(winner)]


def tuned_alone(winner: Winner) -> list[str]:
    """What the winner's own fine-tuning brought."""
    if winner.as_found is None:
        return []
    return [f"As the search found it, before a fine-tuning of its own, it had {score(winner.as_found)}."]


def numerics(name: str, subnet: SubNetwork) -> str:
    """``INT8``, or the bits of the sub-network's layers where some have fewer than the rest of it."""
    bits = sorted({*subnet.bits}) if name == "int8" else []
    outer = subnet.fewest_bits == 4 and f", embeddings of {subnet.embed_bits}"
    if bits in ([], [8]):
        return name.upper() + (outer or "")
    return f"layers of {' or '.join(map(str, bits))} bits{outer or ''}"


def beside_free(data: ReportData) -> list[str]:
    """Who wins on what: the winner or the strongest form of the unpruned model that meets the budgets."""
    winner, rival = data.winner, data.strongest_rival
    if winner is None or winner.free:
        return []
    if rival is None:
        told = any(reference.within_budgets is not None for reference in data.references)
        return ["No form of the unpruned model meets the budgets."] if told else []
    test = next((t for t in winner.tests if rival.name.endswith(t.against.rsplit(" in ", 1)[-1])), None)
    gains = [*_accuracy_gain(winner, rival, test), *_size_gain(winner, rival)]
    ours, theirs = ([text for mine, text in gains if mine is side] for side in (True, False))
    name = rival.name.replace("unpruned,", "the unpruned model in")
    said = f"Beside {name}, the strongest that is free within the budgets, the winner "
    if not ours:
        lacking = ", ".join(theirs) or "as far as the items tell it is as accurate, at the same bytes"
        return [said + f"has nothing to offer: {lacking}. Try more minutes, or another budget."]
    return [said + f"is {', '.join(ours)}" + (f"; but {', '.join(theirs)}." if theirs else ".")]


def _accuracy_gain(winner: Winner, rival: Reference, test: PairedTest | None) -> list[tuple[bool, str]]:
    assert rival.accuracy is not None
    gap = winner.accuracy.value - rival.accuracy.value
    if test is not None and test.p_value >= SIGNIFICANCE:
        return []
    return [(gap > 0, f"{abs(100 * gap):.1f} points {'more' if gap > 0 else 'less'} accurate")]


def _size_gain(winner: Winner, rival: Reference) -> list[tuple[bool, str]]:
    """Bytes alone: times that were not taken in turns tell of the machine as much as of the model."""
    mine, theirs = winner.weight_bytes, rival.weight_bytes
    if abs(1 - mine / theirs) < NOTEWORTHY:
        return []
    less = mine < theirs
    return [(less, f"{abs(1 - mine / theirs):.0%} {'smaller' if less else 'larger'}")]


def _form(subnet: SubNetwork) -> str:
    """The whole model's bits as its rows name them: ``INT8``, ``INT4, embeddings INT8``, ``INT4``."""
    if min(subnet.bits) == 8:
        return "INT8"
    return "INT4" if subnet.embed_bits == 4 else "INT4, embeddings INT8"


def headline(data: ReportData) -> str:
    """The run's result in one sentence."""
    winner = data.winner
    if winner is None:
        return f"No sub-network of {data.model} meets the budgets of {data.profile}."
    if winner.free:
        form = f"the unpruned model in {_form(winner.subnet)}"
        kept = f"{size(winner.weight_bytes)}, {percent(winner.accuracy.value)} {data.accuracy_label}"
        met = "every budget met" if all(b.met for b in data.budgets) else "over budget"
        return (
            f"nothing found beats {form}, which is free, so that is the winner: {kept}; {met}. Try more "
            "minutes, or another budget."
        )
    missed = [BUDGET_NAMES[b.name].lower() for b in data.budgets if not b.met]
    text = f"{size(winner.weight_bytes)} of weights"
    full = data.reference("int8")
    if full is not None:
        text += f", {ratio(full.weight_bytes, winner.weight_bytes)} smaller than unpruned INT8"
    text += f", {percent(winner.accuracy.value)} {data.accuracy_label}"
    if missed:
        return f"{text}; over budget on {' and '.join(missed)}."
    return f"{text}; every budget met." if data.budgets else f"{text}."
