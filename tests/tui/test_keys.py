"""What keys do: bad input is named and holds one back, going back keeps everything, windows open."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from compressor.profile import profile_text
from tests.tui.sample_run import write_run
from tests.tui.test_processes import HOLDER
from tests.tui.test_screens import settle
from tui.app import Wizard
from tui.screens.choose import ChooseStep
from tui.screens.dialogs import HelpDialog, LeaveDialog, OpenRunDialog, PathDialog, TooSmallDialog
from tui.screens.step import Step

Build = Callable[..., Wizard]
Drive = Callable[[Pilot[None], Wizard], Awaitable[None]]


def drive(app: Wizard, steps: Drive, size: tuple[int, int] = (80, 24)) -> None:
    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            await steps(pilot, app)

    asyncio.run(run())


async def press(pilot: Pilot[None], *keys: str) -> None:
    """Press one key after the other, each once the one before has done its work."""
    for key in keys:
        await pilot.press(key)
        await settle(pilot)


async def fill(pilot: Pilot[None], field: str, text: str) -> None:
    """Go to a field and type over what stands there."""
    box = pilot.app.screen.query_one(f"#input-{field}", Input)
    box.focus()
    await pilot.pause()
    box.value = ""
    await pilot.press(*text)
    await settle(pilot)


def message(app: Wizard) -> str:
    return str(app.screen.query_one("#message", Static).content)


def step(app: Wizard) -> str:
    assert isinstance(app.screen, Step)
    return app.screen.step


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


def test_going_back_keeps_what_was_chosen(wizard: Build) -> None:
    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await fill(pilot, "ttft_budget", "777")
        await press(pilot, "ctrl+n", "ctrl+n")
        assert step(app) == "plan"
        assert "--ttft-budget 777" in app.choices.command_line()
        await press(pilot, "escape", "escape")
        assert step(app) == "device"
        assert app.screen.query_one("#input-ttft_budget", Input).value == "777"

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
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()

        async def steps(pilot: Pilot[None], app: Wizard) -> None:
            await press(pilot, "ctrl+n", "ctrl+n", "ctrl+n")
            assert "is in use by process" in message(app)
            assert step(app) == "plan"

        drive(wizard(), steps)
        holder.kill()


def test_a_folder_with_a_run_of_another_model_holds_one_back(wizard: Build) -> None:
    folder = write_run(Path("runs/starter-starter-cpu"), 5)
    text = folder.run_file.read_text()
    folder.run_file.write_text(text.replace('"model": "starter"', '"model": "owner/other"'))

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await press(pilot, "ctrl+n", "ctrl+n", "ctrl+n")
        assert "is a run of model 'owner/other'" in message(app)
        assert step(app) == "plan"

    drive(wizard(), steps)


def test_leaving_while_a_run_works_asks_and_can_let_it_run(wizard: Build) -> None:
    folder = write_run(Path("runs/sample"), 5)
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()

        async def steps(pilot: Pilot[None], app: Wizard) -> None:
            assert step(app) == "run"
            await pilot.press("ctrl+q")
            await pilot.pause()
            assert isinstance(app.screen, LeaveDialog)
            await pilot.press("escape")
            await pilot.pause()
            assert step(app) == "run"
            await pilot.press("ctrl+q")
            await pilot.pause()
            await pilot.press("enter")
            await pilot.pause()

        drive(wizard(folder.path), steps)
        assert holder.poll() is None
        holder.kill()


def test_a_damaged_run_is_refused_with_the_way_out(wizard: Build) -> None:
    folder = write_run(Path("runs/sample"), 5)
    folder.run_file.write_text("{}")

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        assert "damaged" in app.open_run(folder.path)
        await settle(pilot)
        assert step(app) == "device"

    drive(wizard(), steps)


def test_a_run_is_opened_from_the_list(wizard: Build) -> None:
    write_run(Path("runs/sample"))

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await pilot.press("ctrl+o")
        await pilot.pause()
        assert isinstance(app.screen, OpenRunDialog)
        await pilot.press("enter")
        await settle(pilot)
        assert step(app) == "choose"

    drive(wizard(), steps)


def test_other_budgets_pick_again_at_once(wizard: Build) -> None:
    write_run(Path("runs/sample"))

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        assert isinstance(app.screen, ChooseStep)
        assert app.screen.selected is not None and app.screen.selected.chosen
        await press(pilot, "4")
        await fill(pilot, "memory_gib", "0.165")
        assert app.screen.selected is not None and not app.screen.selected.chosen
        assert all(app.screen.selected.met)
        await fill(pilot, "tpot_ms", "0.1")
        assert "Nothing that was evaluated" in str(app.screen.query_one("#verdict", Static).content)

    drive(wizard(Path("runs/sample")), steps)


def test_the_table_is_sorted_by_the_next_column(wizard: Build) -> None:
    write_run(Path("runs/sample"))

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        assert isinstance(app.screen, ChooseStep)
        chosen = app.screen.selected
        await press(pilot, "o")
        sizes = [pick.candidate.weight_bytes for pick in app.screen.picks]
        assert sizes == sorted(sizes)
        assert app.screen.selected is not None and chosen is not None
        assert app.screen.selected.digest == chosen.digest

    drive(wizard(Path("runs/sample")), steps)


def test_the_last_step_has_none_after_it_and_says_what_is_missing(wizard: Build) -> None:
    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        app.go("serve")
        await settle(pilot)
        await press(pilot, "ctrl+n", "ctrl+s")
        assert step(app) == "serve"
        assert "there is no package yet" in message(app)

    drive(wizard(), steps)


def test_help_themes_and_the_folder_picker_open_and_close(wizard: Build) -> None:
    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await press(pilot, "f1")
        assert isinstance(app.screen, HelpDialog)
        await press(pilot, "escape", "ctrl+t")
        assert app.theme == "textual-light"
        await press(pilot, "ctrl+n", "down", "enter")
        app.screen.query_one("#browse").focus()
        await pilot.press("enter")
        await pilot.pause()
        assert isinstance(app.screen, PathDialog)
        await press(pilot, "escape")
        assert step(app) == "model"

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


def test_a_run_at_work_is_paused_and_stopped_by_keys(wizard: Build) -> None:
    folder = write_run(Path("runs/sample"), 5)
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()

        async def steps(pilot: Pilot[None], app: Wizard) -> None:
            run = app.run_at_work
            assert run is not None
            await press(pilot, "p")
            await pilot.pause(0.6)
            assert run.paused and "Paused" in message(app)
            await press(pilot, "p")
            await pilot.pause(0.6)
            assert not run.paused and message(app) == ""
            await press(pilot, "s")
            assert holder.wait(30) == 130
            await pilot.pause(1.0)
            assert "R goes on, F finishes" in message(app)

        drive(wizard(folder.path), steps)


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
