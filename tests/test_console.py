"""The terminal shows stage, rate, time left, the best so far and warnings."""

import io

from rich.console import Console

from compressor.console import BarProgress, PlainProgress, terminal_listener
from compressor.events import CandidateEvaluated, Message, StageFinished, StageProgress, StageStarted

SUBNET = {"layers": [0], "widths": [8], "bits": [8]}


def test_a_pipe_gets_plain_lines() -> None:
    out = io.StringIO()
    with terminal_listener(Console(file=out, width=200)) as listener:
        assert isinstance(listener, PlainProgress)
        listener(StageStarted("search", "Search", 40))
        listener.last -= 60  # as if a minute had passed
        listener(CandidateEvaluated(0, SUBNET, {"accuracy": 0.71, "weight_bytes": 118e6}, True))
        listener(StageProgress("search", 10, 40))
        listener(Message("disk is nearly full", "warning"))
        listener(StageFinished("search", 12.0))
    text = out.getvalue()
    assert "Search ..." in text
    assert "10/40" in text and "/s" in text and "left" in text
    assert "best 0.710 at 118 MB" in text
    assert "warning: disk is nearly full" in text
    assert "done in 12 s" in text


def test_a_flood_of_progress_is_thinned_out() -> None:
    out = io.StringIO()
    with terminal_listener(Console(file=out, width=200)) as listener:
        listener(StageStarted("tune", "Tune", 1000))
        for step in range(1000):
            listener(StageProgress("tune", step, 1000))
    assert len(out.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with terminal_listener(Console(file=out, force_terminal=True, width=160)) as listener:
        assert isinstance(listener, BarProgress)
        listener(StageStarted("search", "Search", 4))
        listener(StageProgress("search", 4, 4))
        listener(StageFinished("search", 3.0))
    assert "Search" in out.getvalue() and "4/4" in out.getvalue()


def test_a_failed_candidate_is_never_the_best() -> None:
    listener = PlainProgress(Console(file=io.StringIO()))
    listener(CandidateEvaluated(0, SUBNET, {"accuracy": 0.9}, False, failed=True))
    assert listener.best.line == ""
