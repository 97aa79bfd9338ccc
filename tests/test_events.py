"""Events cross process boundaries unchanged."""

import json

import pytest

from compressor import events


@pytest.mark.parametrize(
    "event",
    [
        events.StageStarted("search", "Searching", 40, "sub-networks"),
        events.StageProgress("search", 3, 40, "best 0.61"),
        events.StageFinished("search", 12.5, skipped=True),
        events.LossReported(7, "super", 1.25),
        events.CandidateEvaluated(3, {"layers": [0], "widths": [8], "bits": [8]}, {"accuracy": 0.5}, True),
        events.Message("disk is nearly full", "warning"),
        events.RunFinished("runs/demo", {"accuracy": 0.7}),
    ],
)
def test_an_event_survives_json(event: events.Event) -> None:
    assert events.event_from_dict(json.loads(json.dumps(event.to_dict()))) == event
