"""What keys do: going back keeps everything, windows open, a run is watched and stopped."""

from __future__ import annotations

from pathlib import Path

from textual.pilot import Pilot
from textual.widgets import Input, Static

from tests.tui.driving import Build, drive, fill, message, press, settle, step
from tests.tui.sample_run import worked_on, write_run
from tui.app import Wizard
from tui.screens.choose import ChooseStep
from tui.screens.dialogs import HelpDialog, LeaveDialog, OpenRunDialog, PathDialog
from tui.widgets.trail import STEPS


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


def test_leaving_while_a_run_works_asks_and_can_let_it_run(wizard: Build) -> None:
    folder = write_run(Path("runs/sample"), 5)
    with worked_on(folder) as holder:

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


def test_a_run_at_work_is_paused_and_stopped_by_keys(wizard: Build) -> None:
    folder = write_run(Path("runs/sample"), 5)
    with worked_on(folder) as holder:

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
            assert holder.wait(240) == 130
            await pilot.pause(1.0)
            assert "R goes on, F finishes" in message(app)

        drive(wizard(folder.path), steps)


def test_every_format_shows_its_line_and_needs_a_place(wizard: Build) -> None:
    write_run(Path("runs/sample"))

    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        await press(pilot, "ctrl+n")
        line = app.screen.query_one("#line", Static)
        assert str(line.content).startswith("compress package runs/sample --pick ")
        await press(pilot, "shift+tab", "shift+tab", "right", "enter")
        assert str(line.content).startswith("compress export runs/sample --format gguf --pick ")
        assert str(line.content).endswith("--out runs/sample/model.gguf")
        await fill(pilot, "out", "")
        app.screen.query_one("#input-out", Input).value = ""
        await press(pilot, "ctrl+s")
        assert "name the file or folder" in message(app)
        await press(pilot, "ctrl+n")
        assert step(app) == "package"

    drive(wizard(Path("runs/sample")), steps)


def test_screens_are_built_before_they_are_shown(wizard: Build) -> None:
    async def steps(pilot: Pilot[None], app: Wizard) -> None:
        for _ in range(200):
            if all(app.get_screen(name).is_running for name, _ in STEPS):
                break
            await pilot.pause(0.05)
        assert all(app.get_screen(name).is_running for name, _ in STEPS)
        assert step(app) == "device"
        await press(pilot, "ctrl+n", "ctrl+n", "escape")
        assert step(app) == "model"

    drive(wizard(ahead=True), steps)
