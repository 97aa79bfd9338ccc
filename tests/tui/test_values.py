"""The wizard's values: choices as flags, events folded, charts, words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor import events
from compressor.engines.memory import required_memory_bytes
from compressor.errors import InputError
from compressor.request import Tuning, stored_request, understand
from compressor.runfolder import RunFolder
from compressor.space import SubNetwork, weight_bytes
from tests.tui.sample_run import BEGAN, SHAPE, STARTER, request, run_events, space, write_run
from tui import words
from tui.charts import Sample, make_chart
from tui.choices import Choices, of_request
from tui.follow import EventFile
from tui.helptext import styled
from tui.probe import understood
from tui.progress import RunProgress
from tui.results import Pick, read_results, weight_budget_bytes
from tui.widgets.architecture import drawing


def as_asked(arguments: list[str]) -> dict[str, str]:
    """Flags of a command line that has only flags with values, and ``--resume`` at its end."""
    *pairs, last = arguments
    assert last == "--resume"
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def test_choices_are_the_flags_of_a_command_line_that_asks_the_same(tmp_path: Path) -> None:
    choices = Choices().but(profile="starter-cpu", memory_budget=0.2, evaluations=7).in_folder(tmp_path / "r")
    asked = as_asked(choices.arguments())
    assert asked.pop("--run") == str(tmp_path / "r")
    typed = {"--memory-budget": float, "--evaluations": int}
    flags = {name[2:].replace("-", "_"): typed.get(name, str)(value) for name, value in asked.items()}
    assert understand(flags, tmp_path / "r", resume=True)[1] == choices.request()


def test_a_flag_taken_back_is_the_profiles_own_again() -> None:
    choices = Choices().but(profile="starter-cpu", ttft_budget=1.0)
    assert choices.request().profile.budgets.ttft_ms == 1
    assert choices.but(ttft_budget=None) == Choices().but(profile="starter-cpu")


def test_an_opened_run_is_asked_again_as_it_was_and_takes_changes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    choices = of_request(stored_request(folder), folder.path)
    assert choices.request() == request()
    assert as_asked(choices.arguments()) == {"--run": str(folder.path)}
    assert choices.but(evaluations=9).request().effort.evaluations == 9
    assert choices.in_folder(tmp_path / "other").request().profile.name == "starter-cpu"
    asked = {"lora_rank": 8, "tuning": Tuning(recipe="sandwich", temperature=2.0)}
    adapted = of_request(request().model_copy(update=asked), folder.path)
    again = adapted.in_folder(tmp_path / "other").request()
    assert (again.lora_rank, again.tuning) == (8, asked["tuning"])


def test_events_are_read_as_they_are_written_even_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = json.dumps({**events.Message("half of a line").to_dict(), "time": 5.0}) + "\n"
    followed = EventFile(path)
    assert followed.new() == []
    path.write_text(line[:20])
    assert followed.new() == []
    with path.open("a") as stream:
        stream.write(line[20:] + "not json\n" + '{"event": "Unheard", "time": 1}\n' + line)
    message = (5.0, events.Message("half of a line"))
    assert followed.new() == [message, message]
    assert followed.new() == []
    path.write_text(line)
    assert followed.new() == [message]


def test_progress_knows_stages_the_best_and_the_time_left() -> None:
    progress = RunProgress(SHAPE.num_layers, SHAPE.intermediate_size)
    for moment, event in run_events(20):
        progress.see(moment, event)
    stage = progress.current
    assert stage is not None and stage.title == "Searching sub-networks"
    assert stage.share == 0.5
    assert stage.seconds_left == pytest.approx(20 * 6.5)
    assert progress.stages["supernet"].seconds == 270
    assert progress.best is not None and progress.best.accuracy == max(
        p.accuracy or 0 for p in progress.points.values() if p.on_front
    )
    assert progress.log == [("warning", "the unpruned model takes 175 MiB; the budget is 138 MiB")]
    assert progress.verdict is None


def test_a_resumed_run_shows_its_stages_in_the_order_of_the_last_start() -> None:
    progress = RunProgress()
    progress.see(BEGAN, events.StageStarted("base", "Loading"))
    progress.see(BEGAN, events.StageStarted("text", "Writing"))
    progress.see(BEGAN, events.RunFinished("runs/x", {"budgets_met": True}))
    progress.see(BEGAN, events.StageStarted("base", "Loading"))
    progress.see(BEGAN, events.StageFinished("base", 0.0, skipped=True))
    assert list(progress.stages) == ["text", "base"]
    assert progress.verdict is None


def test_what_was_not_measured_is_not_drawn() -> None:
    samples = [Sample(0.5, 2**20, None), Sample(None, 2**20, 1.0)]
    assert make_chart("size", "Accuracy", samples).front == ((1.0, 50.0),)
    assert make_chart("speed", "Accuracy", samples).empty


def test_what_if_picks_by_the_runs_own_rule_and_says_what_is_missed(tmp_path: Path) -> None:
    results = read_results(write_run(tmp_path / "run").path, SHAPE)
    own = results.request.profile.budgets
    usual = results.what_if(own).digest
    able = [pick for pick in results.picks(own, usual) if all(pick.met)]
    best = max(low_of(pick) for pick in able)
    tied = [pick for pick in able if high_of(pick) >= best]
    assert usual == min(tied, key=lambda pick: pick.candidate.weight_bytes).digest
    tight = own.model_copy(update={"memory_gib": 0.165})
    other = results.what_if(tight)
    assert other.digest is not None and other.digest != usual
    assert other.digest in {pick.digest for pick in results.picks(tight, other.digest) if all(pick.met)}
    nothing = results.what_if(own.model_copy(update={"tpot_ms": 0.1}))
    assert nothing.digest is None
    assert "each token at" in nothing.text


def test_where_nothing_meets_the_budgets_the_best_trade_offs_are_shown(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run")
    data = json.loads(folder.front.read_text())
    for candidate in data["candidates"]:
        candidate.update(on_front=False, status="infeasible")
    folder.front.write_text(json.dumps(data))
    results = read_results(folder.path, SHAPE)
    picks = results.picks()
    assert results.winner_digest in {pick.digest for pick in picks}
    ranked = sorted(picks, key=lambda pick: pick.candidate.weight_bytes)
    scores = [pick.candidate.accuracy.value for pick in ranked if pick.candidate.accuracy]
    assert len(picks) > 3 and scores == sorted(scores)


def test_the_budgets_line_stands_where_memory_meets_the_budget() -> None:
    asked, subnets = request(), (space().smallest, space().full)
    for subnet in subnets:
        needed = required_memory_bytes(SHAPE, subnet, asked.profile.workload).total
        budgets = asked.profile.budgets.model_copy(update={"memory_gib": needed / 2**30})
        profile = asked.profile.model_copy(update={"budgets": budgets})
        line = weight_budget_bytes(asked.model_copy(update={"profile": profile}), STARTER)
        assert line == pytest.approx(weight_bytes(SHAPE, subnet, "int8"), rel=1e-4)


def test_where_bits_can_be_chosen_the_budget_is_no_line() -> None:
    asked = request()
    space = asked.profile.space.model_copy(update={"bits": [4, 8]})
    profile = asked.profile.model_copy(update={"space": space})
    assert weight_budget_bytes(asked.model_copy(update={"profile": profile}), STARTER) is None


def test_help_is_styled_without_its_marks() -> None:
    shown = styled("# Title\n\nwith **bold** and `code`\nin one line\n- *one*: 1\n- [two]")
    assert shown.plain == "Title\n\nwith bold and code in one line\n• one: 1\n• [two]"


def low_of(pick: Pick) -> float:
    assert pick.candidate.accuracy is not None and pick.candidate.accuracy.low is not None
    return pick.candidate.accuracy.low


def high_of(pick: Pick) -> float:
    assert pick.candidate.accuracy is not None and pick.candidate.accuracy.high is not None
    return pick.candidate.accuracy.high


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    folder.front.write_text("{}")
    with pytest.raises(Exception, match=r"front\.json is damaged"):
        read_results(folder.path, SHAPE)
    folder.front.unlink()
    with pytest.raises(InputError, match="no result yet"):
        read_results(folder.path, SHAPE)


def test_the_drawing_shows_kept_layers_widths_and_bits() -> None:
    subnet = SubNetwork((0, 2), (1536, 768), (8, 4))
    top, second, third, bottom, *_ = drawing(subnet, 3, 1536).plain.split("\n")
    assert (top, second, third, bottom) == ("█  ", "█  ", "█ █", "█·█")
    assert "2 of 3 layers, MLPs 75% of 1536" in drawing(subnet, 3, 1536).plain
    assert "4 bits" not in drawing(space().full, 30, 1536).plain


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (3.4, "3 s"), (89, "89 s"), (300, "5 min"), (6000, "1 h 40 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


def test_sizes_and_counts() -> None:
    assert [words.size(n) for n in (None, 0, 2048, 144 * 2**20, 3 * 2**30)] == [
        "–",
        "0 B",
        "2.00 KiB",
        "144 MiB",
        "3.00 GiB",
    ]
    assert words.count(134_515_008) == "135 million"
    assert words.power(1.3e10) == "1.3·10¹⁰"


def test_a_check_that_breaks_says_so() -> None:
    with pytest.raises(InputError, match="ImportError: no numpy"):
        understood("", "Traceback ...\nImportError: no numpy\n")
    with pytest.raises(InputError, match=r"^no model 'x'$"):
        understood('noise\n{"error": "no model \'x\'"}\n', "")


def test_a_run_folder_without_a_run_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        read_results(RunFolder(tmp_path).path, SHAPE)
