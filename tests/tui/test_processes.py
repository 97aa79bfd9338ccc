"""Runs and endpoints as processes: started, found again, paused, stopped, and heard when they fail."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from compressor.errors import InputError, PackageError, RunConflictError
from compressor.runfolder import RunFolder
from tests.tui.sample_run import worked_on, write_run
from tui.background import NICENESS, STOPPED_BY_HAND, BackgroundRun, Ending, last_complaint
from tui.choices import Choices
from tui.endpoint import Endpoint, refuse_taken_port


def until(true: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def held_run(tmp_path: Path) -> Iterator[RunFolder]:
    """A run folder that a process works on, as a run in the background does."""
    folder = write_run(tmp_path / "run", 5)
    with worked_on(folder):
        yield folder


def test_a_run_at_work_is_found_paused_resumed_and_stopped(held_run: RunFolder) -> None:
    run = BackgroundRun.attach(held_run.path)
    assert run is not None and run.alive and not run.paused
    run.pause()
    assert until(lambda: run.paused)
    run.resume()
    assert until(lambda: not run.paused)
    run.pause()
    run.stop()
    assert until(lambda: not run.alive)
    assert BackgroundRun.attach(held_run.path) is None


def test_a_folder_at_work_is_not_started_again(held_run: RunFolder) -> None:
    choices = Choices().but(profile="starter-cpu").in_folder(held_run.path)
    with pytest.raises(RunConflictError, match=r"in use by process \d+.*ctrl\+o"):
        BackgroundRun.start(choices)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 5)
    folder.run_file.write_text("{")
    with pytest.raises(RunConflictError, match=r"run\.json is damaged"):
        BackgroundRun.start(Choices().but(profile="starter-cpu").in_folder(folder.path))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = Choices().but(profile="starter-cpu").in_folder(tmp_path / "file" / "run")
    with pytest.raises(InputError, match="cannot write the run folder"):
        BackgroundRun.start(choices)


def test_a_run_that_fails_leaves_its_message_and_lives_in_a_session_of_its_own(tmp_path: Path) -> None:
    choices = Choices().but(profile="starter-cpu", model=str(tmp_path)).in_folder(tmp_path / "run")
    run = BackgroundRun.start(choices)
    assert os.getsid(run.pid) == run.pid != os.getsid(0)
    assert os.getpriority(os.PRIO_PROCESS, run.pid) >= NICENESS
    assert until(lambda: not run.alive, 120)
    ending = run.ending()
    assert ending.failed and ending.code == 2
    assert "holds no model (no config.json)" in ending.complaint


def test_a_run_can_be_stopped_though_the_wizard_itself_ignores_interrupts(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = BackgroundRun.start(Choices().in_folder(tmp_path / "run"))
    try:
        assert until(run.folder.run_file.exists, 120)
        run.stop()
        assert until(lambda: not run.alive, 60)
    finally:
        signal.signal(signal.SIGINT, before)
        if run.alive:
            os.kill(run.pid, signal.SIGKILL)
    assert run.ending().code == STOPPED_BY_HAND and not run.ending().failed


@pytest.mark.parametrize(
    ("code", "complaint", "failed"),
    [
        (0, "", False),
        (3, "", False),
        (130, "interrupted; what was finished is kept", False),
        (-signal.SIGINT, "", False),
        (2, "the disk is full", True),
        (-signal.SIGKILL, "", True),
        (None, "the disk is full", True),
        (None, "interrupted; what was finished is kept", False),
        (None, "", False),
    ],
)
def test_how_a_run_ended(code: int | None, complaint: str, failed: bool) -> None:
    assert Ending(code, complaint).failed is failed


def test_a_traceback_is_quoted_by_its_last_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 5)
    folder.log.write_text("Loading ...\nTraceback (most recent call last):\n  File x\nKeyError: 'y'\n")
    assert last_complaint(folder) == "KeyError: 'y'"


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be used"):
            refuse_taken_port(port)
    refuse_taken_port(port)
    with pytest.raises(InputError, match="65535"):
        refuse_taken_port(70_000)


def test_an_endpoint_that_cannot_start_says_why(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = Endpoint(tmp_path, port, "")
    endpoint.start()
    with pytest.raises(PackageError, match="is not a package"):
        endpoint.wait_ready()
    assert not endpoint.alive


def test_the_curl_line_is_one_shell_command() -> None:
    import shlex

    words = shlex.split(Endpoint(Path("package"), 8000, "se cret").curl_line("a'b"))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert "Authorization: Bearer se cret" in words
    assert '"model": "a\'b"' in words[-1]


def test_the_app_is_imported_without_anything_heavy() -> None:
    code = (
        "import sys, importlib, tui.app\n"
        "for name in 'device model plan run choose package serve'.split():\n"
        "    importlib.import_module('tui.screens.' + name)\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'pandas', 'sklearn', 'onnxruntime', 'onnx'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SLEEPER = "import time\nprint('up', flush=True)\ntime.sleep(120)\n"
STARTER_OF_ONE = """
import subprocess, sys, time
command = [sys.executable, "-m", "tui.tethered", "sleeper"]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(120)
"""


def test_what_is_tethered_ends_with_a_killed_wizard(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", STARTER_OF_ONE]
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as wizard:
        assert wizard.stdout is not None
        pid = int(wizard.stdout.readline())
        assert psutil.pid_exists(pid)
        wizard.kill()
    assert until(lambda: not psutil.pid_exists(pid))


def test_a_lost_terminal_ends_the_wizard_and_not_its_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 5)
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "tui", str(folder.path)]
    runs: list[psutil.Process] = []
    with hearing_hang_ups():
        wizard = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    threading.Thread(target=drained, args=(master,), daemon=True).start()

    def pressed_until_it_runs() -> bool:
        os.write(master, b"r")
        runs[:] = [p for p in psutil.Process(wizard.pid).children() if "--resume" in p.cmdline()]
        return bool(runs)

    try:
        assert until(pressed_until_it_runs, 60)
        wizard.send_signal(signal.SIGHUP)
        wizard.wait(30)
        time.sleep(0.5)
        assert runs[0].is_running() and runs[0].status() != psutil.STATUS_ZOMBIE
    finally:
        wizard.kill()
        wizard.wait()
        for run in runs:
            run.kill()


@contextmanager
def hearing_hang_ups() -> Iterator[None]:
    """What is started meanwhile hears SIGHUP, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def drained(terminal: int) -> None:
    """Read what is written to a terminal, so that nobody waits for it."""
    while True:
        try:
            os.read(terminal, 65536)
        except OSError:
            return
