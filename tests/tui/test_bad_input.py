"""Bad input: every wrong value is named where it is typed, and holds one back."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from compressor.profile import profile_text
from tests.tui.driving import Build, drive, fill, message, press, settle, step
from tests.tui.sample_run import worked_on, write_run
from tui.app import Wizard
from tui.screens.dialogs import PathDialog, TooSmallDialog


@pytest.mark.parametrize(
    ("field", "text", "complaint"),
    [
        ("memory_budget", "much", "'much' is not a number"),
        ("memory_budget", "-1", "a number above 0"),
        ("memory_budget", "nan", "'nan' is not a number"),
        ("memory_budget", "99", "more than the device has"),
        ("prompt_tokens", "1.5", "'1.5' is not a whole number"),
        ("concurrency", "0", "a whole number above 0"),
    ],
)
def test_a_wrong_budget_is_named_and_holds_one_back(
    field: str, text: str, complaint: str, wizard: Build
) -> None:
    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await fill(pilot, field, text)
        assert complaint in message(app)
        await press(pilot, "ctrl+n")
        assert step(app) == "device"
        await fill(pilot, field, "1")
        assert message(app) == ""
        await press(pilot, "ctrl+n")
        assert step(app) == "model"

    drive(wizard(), steps)


def test_a_profile_that_does_not_fit_holds_one_back(wizard: Build) -> None:
    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await press(pilot, "down", "down", "down")
        assert "raspberry-pi-5 needs a CPU named Raspberry Pi 5" in message(app)
        await press(pilot, "ctrl+n")
        assert step(app) == "device"

    drive(wizard(), steps)


def test_a_model_that_is_not_there_is_named(wizard: Build) -> None:
    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await press(pilot, "ctrl+n", "down", "down", "down", "enter")
        await press(pilot, "ctrl+n")
        assert "name the model" in message(app)
        await fill(pilot, "model", "no/model")
        assert "no model 'no/model'" in str(app.screen.query_one("#verdict", Static).content)
        await press(pilot, "ctrl+n")
        assert step(app) == "model"

    drive(wizard(), steps)


def test_tasks_need_a_name_and_their_data_a_folder(wizard: Build) -> None:
    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await press(pilot, "ctrl+n", "tab", "down", "down", "enter")
        await press(pilot, "ctrl+n")
        assert "name at least one lm-eval task" in message(app)
        await fill(pilot, "tasks", "arc_easy")
        await fill(pilot, "task_data", "nowhere")
        await press(pilot, "ctrl+n")
        assert "there is no folder nowhere" in message(app)
        await fill(pilot, "task_data", ".")
        await press(pilot, "ctrl+n")
        assert step(app) == "plan"
        assert "--tasks arc_easy" in app.choices.command_line()

    drive(wizard(), steps)


def test_a_run_folder_in_use_holds_one_back(wizard: Build) -> None:
    folder = write_run(Path("runs/starter-starter-cpu"), 5)
    with worked_on(folder):

        async def steps(pilot: Pilot[None], app: Wizard) -> None:
            await press(pilot, "ctrl+n", "ctrl+n", "ctrl+n")
            assert "is in use by process" in message(app)
            assert step(app) == "plan"

        drive(wizard(), steps)


def test_a_folder_with_a_run_of_another_model_holds_one_back(wizard: Build) -> None:
    folder = write_run(Path("runs/starter-starter-cpu"), 5)
    text = folder.run_file.read_text()
    folder.run_file.write_text(text.replace('"model": "starter"', '"model": "owner/other"'))

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await press(pilot, "ctrl+n", "ctrl+n", "ctrl+n")
        assert "is a run of model 'owner/other'" in message(app)
        assert step(app) == "plan"

    drive(wizard(), steps)


def test_a_damaged_run_is_refused_with_the_way_out(wizard: Build) -> None:
    folder = write_run(Path("runs/sample"), 5)
    folder.run_file.write_text("{}")

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        assert "damaged" in app.open_run(folder.path)
        await settle(pilot)
        assert step(app) == "device"

    drive(wizard(), steps)


def test_a_terminal_made_smaller_and_larger_again(wizard: Build) -> None:
    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await pilot.resize_terminal(50, 15)
        await settle(pilot)
        assert isinstance(app.screen, TooSmallDialog)
        await pilot.resize_terminal(100, 30)
        await settle(pilot)
        assert step(app) == "device"

    drive(wizard(), steps)


def test_a_profile_file_of_ones_own_is_taken_or_its_fault_named(wizard: Build) -> None:
    Path("mine.toml").write_text(profile_text("starter-cpu").replace("starter-cpu", "mine"))
    Path("wrong.toml").write_text("name = 3")

    async def choose(pilot: Pilot[None], app: Wizard, file: str) -> None:
        app.screen.query_one("#profiles").focus()
        await pilot.press("end", "enter")
        await pilot.pause()
        assert isinstance(app.screen, PathDialog)
        await fill_path(pilot, app, file)

    async def fill_path(pilot: Pilot[None], app: Wizard, file: str) -> None:
        app.screen.query_one(Input).value = file
        app.screen.query_one(Input).focus()
        await pilot.press("enter")
        await settle(pilot)

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await choose(pilot, app, "wrong.toml")
        assert "wrong.toml" in message(app)
        assert app.choices.value("profile") == "starter-cpu"
        await choose(pilot, app, "mine.toml")
        assert app.choices.request().profile.name == "mine"
        await press(pilot, "ctrl+n", "ctrl+n")
        assert "--profile mine.toml" in app.choices.command_line()

    drive(wizard(), steps)


def test_without_a_terminal_or_a_run_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "tui"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the wizard needs a terminal" in done.stderr


@pytest.mark.parametrize(
    ("keys", "field", "text", "complaint"),
    [
        (["ctrl+n", "ctrl+n"], "evaluations", "0", "a whole number above 0"),
        (["ctrl+n", "ctrl+n"], "evaluations", "many", "'many' is not a whole number"),
        (["ctrl+n", "ctrl+n"], "tuning_minutes", "-3", "a number above 0"),
        (["ctrl+n", "ctrl+n"], "run", "taken/run", "cannot write the run folder taken/run"),
        (["ctrl+n", "tab", "down", "enter"], "limit", "0", "a whole number above 0"),
        (["ctrl+n", "tab", "down", "enter"], "num_fewshot", "-1", "a whole number of at least 0"),
    ],
)
def test_a_wrong_field_of_model_or_plan_is_named_and_holds_one_back(
    keys: list[str], field: str, text: str, complaint: str, wizard: Build
) -> None:
    Path("taken").write_text("a file, no folder")

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await press(pilot, *keys)
        before = step(app)
        await fill(pilot, field, text)
        await press(pilot, "ctrl+n")
        assert complaint in message(app)
        assert step(app) == before

    drive(wizard(), steps)


def test_a_wrong_budget_of_the_what_if_is_named(wizard: Build) -> None:
    write_run(Path("runs/sample"))

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await press(pilot, "4")
        await fill(pilot, "ttft_ms", "soon")
        assert "'soon' is not a number" in message(app)

    drive(wizard(Path("runs/sample")), steps)


def test_a_port_in_use_or_none_is_named(wizard: Build) -> None:
    folder = write_run(Path("runs/sample"))

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        app.package = folder.package
        app.go("serve")
        await settle(pilot)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            await fill(pilot, "port", str(port))
            line = str(app.screen.query_one("#shell", Static).content)
            assert line.startswith(f"compress serve runs/sample/package --host 127.0.0.1 --port {port} ")
            await press(pilot, "ctrl+s")
            assert f"port {port} cannot be used" in message(app)
        await fill(pilot, "port", "70000")
        await press(pilot, "ctrl+s")
        assert "from 1 to 65535" in message(app)
        await fill(pilot, "port", "http")
        assert "'http' is not a whole number" in message(app)

    drive(wizard(folder.path), steps)
