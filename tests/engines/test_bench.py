"""Timing: repeats, medians, intervals, and turns with a reference."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.engines import bench, paired
from compressor.engines.bench import (
    MAX_STEPS,
    Timings,
    percentile,
    relative_interval,
    summarise,
    time_once,
    time_workload,
)
from compressor.engines.paired import ratio_of, time_pair
from compressor.profile import Workload


class Clock:
    """A clock that only the models under test advance, so that no other load disturbs the figures."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench, paired):
        monkeypatch.setattr(module, "time", CLOCK)


class Sleeper:
    """A model whose prefill and steps take set times, seconds."""

    def __init__(self, prefill: float, step: float) -> None:
        self.times = prefill, step
        self.calls: list[str] = []

    def prefill(self) -> None:
        self.calls.append("prefill")
        CLOCK.now += self.times[0]

    def step(self) -> None:
        self.calls.append("step")
        CLOCK.now += self.times[1]

    def skip(self, tokens: int) -> None:
        self.calls.append(f"skip {tokens}")


WORKLOAD = Workload(prompt_tokens=8, output_tokens=5, concurrency=3)


def test_figures_are_the_models_own() -> None:
    measured = summarise(time_workload(Sleeper(0.02, 0.004), WORKLOAD, max_seconds=0.5), WORKLOAD)
    assert measured.ttft_ms == pytest.approx(20, rel=1e-6)
    assert measured.tpot_ms == pytest.approx(4, rel=1e-6)
    request_s = (measured.ttft_ms + 4 * measured.tpot_ms) / 1e3
    assert measured.throughput_tok_s == pytest.approx(3 * 5 / request_s)
    assert measured.ttft_p90_ms >= measured.ttft_ms


def test_a_steady_model_is_not_measured_longer_than_it_needs() -> None:
    timings = time_workload(Sleeper(0.02, 0.005), WORKLOAD, max_seconds=30)
    assert timings.settled and timings.repeats < 30


def test_a_model_slower_than_the_time_is_measured_once() -> None:
    assert time_workload(Sleeper(0.2, 0.0), WORKLOAD, max_seconds=0.1).repeats == 1


def test_of_long_outputs_the_middle_is_timed() -> None:
    sleeper, timings = Sleeper(0, 0), Timings()
    time_once(sleeper, Workload(prompt_tokens=4, output_tokens=201), timings)
    assert sleeper.calls[:2] == ["prefill", f"skip {(200 - MAX_STEPS) // 2}"]
    assert sleeper.calls.count("step") == MAX_STEPS


def test_one_output_token_has_no_steps() -> None:
    workload = Workload(prompt_tokens=8, output_tokens=1)
    measured = summarise(time_workload(Sleeper(0.01, 0.1), workload, max_seconds=0.1), workload)
    assert measured.tpot_ms == 0 and measured.throughput_tok_s == pytest.approx(1e3 / measured.ttft_ms)


def test_pairs_take_turns_and_give_the_ratio() -> None:
    mine, theirs, ratio = time_pair(
        Sleeper(0.01, 0.004), Sleeper(0.02, 0.008), WORKLOAD, max_seconds=1, min_turns=6
    )
    assert mine.repeats == theirs.repeats == ratio.turns >= 6
    assert ratio.ttft == pytest.approx(0.5, rel=1e-6) and ratio.tpot == pytest.approx(0.5, rel=1e-6)


def test_steps_alternate_so_that_what_disturbs_one_disturbs_both() -> None:
    log: list[str] = []

    class Logged(Sleeper):
        def __init__(self, name: str) -> None:
            super().__init__(0.01, 0.001)
            self.name = name

        def step(self) -> None:
            log.append(self.name)
            super().step()

    mine, theirs, _ = time_pair(
        Logged("a"), Logged("b"), Workload(prompt_tokens=8, output_tokens=20), max_seconds=0, min_turns=1
    )
    assert log[8:] == ["a", "b"] * 20  # after the warm-up: one step before each prefill, 19 after it
    assert len(mine.steps) == len(theirs.steps) == 19
    assert (mine.repeats, len(mine.step_medians), len(mine.step_means)) == (1, 1, 1)


def test_a_cache_that_holds_the_smaller_model_alone_does_not_count() -> None:
    last: list[object] = []

    class Cached(Sleeper):
        """Twice as fast where nothing else ran since its last step."""

        def step(self) -> None:
            CLOCK.now -= self.times[1] / 2 if last == [self] else 0.0
            last[:] = [self]
            super().step()

    class Large(Sleeper):
        def step(self) -> None:
            last[:] = [self]
            super().step()

    _, _, ratio = time_pair(Cached(0.01, 0.004), Large(0.02, 0.008), WORKLOAD, max_seconds=1)
    assert ratio.tpot == pytest.approx(0.5) and ratio.ttft == pytest.approx(0.5)


def test_a_model_that_keeps_changing_is_measured_until_time_is_up() -> None:
    class Slowing(Sleeper):
        def prefill(self) -> None:
            self.times = (self.times[0] * 1.3, self.times[1])
            super().prefill()

    timings = time_workload(Slowing(0.01, 0.0), WORKLOAD, max_seconds=3)
    assert not timings.settled and sum(timings.prefills) >= 3
    (reason,) = summarise(timings, WORKLOAD).conditions["unfit"]
    assert reason.startswith("TTFT varied")


def test_a_machine_of_two_speeds_is_told_beside_what_else_was_wrong() -> None:
    class Flipping(Sleeper):
        def prefill(self) -> None:
            slower = 1 + self.calls.count("prefill") % 2
            self.times = 0.02 * slower, 0.004 * slower
            super().prefill()

    timings = time_workload(Flipping(0.0, 0.0), WORKLOAD, max_seconds=0.5)
    measured = summarise(timings, WORKLOAD, conditions={"unfit": ["the clock jumped"]})
    assert [reason.split(" varied")[0] for reason in measured.conditions["unfit"]] == [
        "the clock jumped",
        "TTFT",
        "TPOT",
    ]


@pytest.mark.parametrize("prefill", [0.02, 0.2])
def test_a_steady_model_is_not_marked_however_few_its_repeats(prefill: float) -> None:
    measured = summarise(time_workload(Sleeper(prefill, 0.004), WORKLOAD, max_seconds=0.1), WORKLOAD)
    assert "unfit" not in measured.conditions


def test_what_slows_both_leaves_the_ratio() -> None:
    class Drifting(Sleeper):
        def prefill(self) -> None:
            self.times = (self.times[0] * 1.1, self.times[1])
            super().prefill()

    _, _, ratio = time_pair(
        Drifting(0.01, 0.001), Drifting(0.02, 0.001), WORKLOAD, max_seconds=1, min_turns=6
    )
    assert ratio.ttft == pytest.approx(0.5, rel=0.1)


def test_a_stall_in_one_turn_leaves_the_ratio() -> None:
    class Stalling(Sleeper):
        def prefill(self) -> None:
            CLOCK.now += 5.0 if self.calls.count("prefill") == 4 else 0.0
            super().prefill()

    _, _, ratio = time_pair(
        Stalling(0.01, 0.004), Sleeper(0.02, 0.008), WORKLOAD, max_seconds=0.1, min_turns=12
    )
    assert ratio.ttft == pytest.approx(0.5) and ratio.ttft_interval < 0.01


def test_turns_that_disagree_have_a_wide_interval() -> None:
    mine, theirs = Timings([0.1, 0.2] * 8, []), Timings([0.2] * 16, [])
    ratio = ratio_of(mine, theirs)
    assert ratio.ttft == pytest.approx(0.5**0.5, rel=0.01) and 0.3 < ratio.ttft_interval < 1
    assert (ratio.tpot, ratio.tpot_interval) == (1.0, 0.0)


@given(st.lists(st.floats(0.1, 10), min_size=4, max_size=50))
def test_the_interval_is_narrow_only_where_values_agree(values: list[float]) -> None:
    assert relative_interval(values) >= 0
    assert relative_interval([statistics.median(values)] * 4) == 0
    assert relative_interval(values[:3]) == float("inf")


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.9) == 3.0
    assert percentile([], 0.9) == 0.0
