"""What the front's sub-networks have in common, and the words for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.report import analysis, wording
from compressor.report.data import Budget, Candidate, PairedTest, ReportData, Score, Workload
from compressor.space import SubNetwork
from tests.report.sample import make_report_data


def small_data(*subnets: SubNetwork) -> ReportData:
    return ReportData(
        model="m",
        profile="p",
        device="d",
        engine="onnxruntime",
        numerics="int8",
        task="agreement",
        workload=Workload(10, 11, 2),
        num_layers=4,
        intermediate_size=100,
        candidates=tuple(
            Candidate(subnet, 1000 * subnet.depth, Score(0.5), on_front=True) for subnet in subnets
        ),
    )


def test_layers_are_counted_over_the_front_only() -> None:
    data = small_data(
        SubNetwork((0, 1, 3), (100, 50, 50)),
        SubNetwork((0, 3), (50, 100)),
        SubNetwork((0, 2, 3), (100, 50, 100)),
    )
    off_front = Candidate(SubNetwork((2,), (100,)), 10, Score(0.1))
    data = replace(data, candidates=(*data.candidates, off_front))
    front = analysis.front_candidates(data)
    assert [c.subnet.depth for c in front] == [2, 3, 3]
    layers = analysis.layer_statistics(front, 4, 100)
    assert [layer.keep_share for layer in layers] == pytest.approx([1, 1 / 3, 1 / 3, 1])
    assert [layer.mean_width for layer in layers] == pytest.approx([250 / 300, 0.5, 0.5, 250 / 300])
    found = analysis.findings(data)
    assert found.always_kept == (0, 3)
    assert found.often_dropped == (1, 2)
    assert found.width_by_third == pytest.approx((250 / 300, 0.5, 250 / 300))


def test_no_front_says_nothing() -> None:
    found = analysis.findings(small_data())
    assert found.sub_networks == 0 and not found.always_kept and not found.never_kept
    assert found.width_by_third == (None, None, None)


points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30)


@given(points, st.booleans())
def test_the_planar_front_is_what_no_other_point_beats(cloud: list[tuple[int, int]], smaller_x: bool) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        no_worse_x = one[0] <= other[0] if smaller_x else one[0] >= other[0]
        return no_worse_x and one[1] >= other[1] and one != other

    expected = {p for p in cloud if not any(beats(q, p) for q in cloud)}
    found = analysis.planar_front(cloud, smaller_x)
    assert set(found) == expected
    assert found == sorted(found)


def test_throughput_at_the_latency_budgets() -> None:
    data = replace(small_data(), budgets=(Budget("ttft_ms", 100), Budget("tpot_ms", 10)))
    assert analysis.budget_throughput_tok_s(data) == pytest.approx(2 * 11 / 0.2)
    assert analysis.budget_throughput_tok_s(small_data()) is None


@given(st.sets(st.integers(0, 40)))
def test_ranges_name_every_number_once(numbers: set[int]) -> None:
    text = analysis.ranges(sorted(numbers))
    named: set[int] = set()
    for part in filter(None, text.split(", ")):
        first, _, last = part.partition(" to ")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == numbers


def test_words_for_figures() -> None:
    assert wording.size(118_400_000) == "118.4 MB"
    assert wording.size(6_738_415_616) == "6.74 GB"
    assert [wording.significant(v) for v in (0.1179, 9.556, 41.23, 1240.4)] == [
        "0.118",
        "9.56",
        "41.2",
        "1,240",
    ]
    assert wording.against(118, 151) == "1.28× smaller"
    assert wording.against(269, 151) == "1.78× larger"
    assert wording.against(151, 151) == "the same"
    assert wording.budget_verdict(Budget("tpot_ms", 10, 8, True)) == "met, 20% to spare"
    assert wording.budget_verdict(Budget("tpot_ms", 10, 11, False)) == "missed by 10%"
    subnet = SubNetwork((0, 2, 3), (64, 32, 64), (8, 4, 8))
    assert (
        wording.architecture(subnet, 4, 64) == "3 of 4 layers, 83% of their MLPs' width, one layer in 4 bits"
    )
    assert wording.layers_named("21") == "layer 21"
    assert wording.layers_named("0 to 3, 7") == "layers 0 to 3, 7"
    assert wording.interval(Score(0.6, 0.581, 0.643)) == "58.1 to 64.3%"


@pytest.mark.parametrize(
    ("test", "said"),
    [
        (PairedTest("INT8", 0.2, 30, 20), "No significant difference from INT8 (McNemar, p = 0.200"),
        (PairedTest("INT8", 0.01, 30, 10), "Significantly better than INT8 (McNemar, p = 0.010"),
        (PairedTest("INT8", 1e-9, 3, 90), "Significantly worse than INT8 (McNemar, p < 0.001"),
    ],
)
def test_better_is_said_only_where_the_test_says_so(test: PairedTest, said: str) -> None:
    assert wording.paired_test(test).startswith(said)


def test_the_headline_is_the_verdict() -> None:
    data = make_report_data()
    assert "every budget met" in wording.headline(data)
    missed = tuple(replace(b, met=b.name != "tpot_ms") for b in data.budgets)
    assert "over budget on time per output token" in wording.headline(replace(data, budgets=missed))
    assert wording.headline(replace(data, winner=None)).startswith("No sub-network of SmolLM2")
