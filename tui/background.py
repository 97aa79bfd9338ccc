"""A run in a process of its own: start it, find it again, pause it, stop it, hear how it ended.

The process is the very command line that a person would type. It outlives the wizard.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from compressor.errors import InputError, RunConflictError
from compressor.runfolder import RunFolder
from tui.choices import Choices

STOPPED_BY_HAND = 130
BUDGETS_MISSED = 3
INTERRUPTED = "interrupted"
NICENESS = 10
"""A run gives way to who sits at the keyboard; where nobody else wants the cores it loses nothing."""


@dataclass(frozen=True)
class Ending:
    """How a run's process ended: its exit code, if it was started here, and what it complained of last."""

    code: int | None
    complaint: str

    @property
    def failed(self) -> bool:
        """Whether it neither went to its end nor was stopped by hand."""
        if self.code is None:
            return bool(self.complaint) and not self.complaint.startswith(INTERRUPTED)
        return self.code not in (0, BUDGETS_MISSED, STOPPED_BY_HAND, -signal.SIGINT)


class BackgroundRun:
    """A run's process, started here or found at work."""

    def __init__(self, folder: RunFolder, pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.folder = folder
        self.pid = pid
        self._child = child

    @classmethod
    def start(cls, choices: Choices) -> BackgroundRun:
        """Start the run. Raises ``CompressorError`` where the folder cannot be used."""
        path = choices.run_folder
        folder = RunFolder(path)
        refuse_unusable(folder)
        _hear_interrupts()
        try:
            path.mkdir(parents=True, exist_ok=True)
            log = folder.log.open("wb")
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {path} ({error.strerror}): choose another one"
            ) from error
        with log:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "compressor.cli", *choices.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _give_way(child.pid)
        return cls(folder, child.pid, child)

    @classmethod
    def attach(cls, path: Path) -> BackgroundRun | None:
        """The process that works on the run at the moment, if one does."""
        folder = RunFolder(path)
        if not folder.run_file.exists() or not folder.in_use:
            return None
        owner = lock_owner(folder)
        return cls(folder, owner) if owner is not None and psutil.pid_exists(owner) else None

    @property
    def alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @property
    def paused(self) -> bool:
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False

    def pause(self) -> None:
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_all(signal.SIGCONT)

    def stop(self) -> None:
        """Ask the run to end now; what it finished is kept, and it can go on later."""
        self.resume()
        self._signal(self.pid, signal.SIGINT)

    def ending(self) -> Ending:
        """How it ended. The exit code is known only of a process that was started here."""
        code = self._child.poll() if self._child is not None else None
        return Ending(code, last_complaint(self.folder))

    def _signal_all(self, number: signal.Signals) -> None:
        """Signal the run and the processes it started."""
        try:
            family = [p.pid for p in psutil.Process(self.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for pid in (self.pid, *family):
            self._signal(pid, number)

    @staticmethod
    def _signal(pid: int, number: signal.Signals) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return


def refuse_unusable(folder: RunFolder) -> None:
    """Raise ``CompressorError`` for a folder that is damaged or that another process works on."""
    if not folder.run_file.exists():
        return
    folder.request()
    if folder.in_use:
        raise RunConflictError(
            f"{folder.path} is in use by process {lock_owner(folder)}: open that run (ctrl+o) to watch it, "
            "or choose another folder"
        )


def lock_owner(folder: RunFolder) -> int | None:
    """The process that wrote its number into the run's lock."""
    try:
        return int((folder.path / "run.lock").read_text().strip())
    except (OSError, ValueError):
        return None


def last_complaint(folder: RunFolder) -> str:
    """The last error in the run's log; a process that died without one has its last line quoted."""
    try:
        lines = folder.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ").strip()
    if any(line.startswith("Traceback ") for line in lines):
        return lines[-1].strip()
    return ""


def _give_way(pid: int) -> None:
    """Lower a process's priority, and that of its session, by which Linux desktops share the cores."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
        Path(f"/proc/{pid}/autogroup").write_text(str(NICENESS))


def _hear_interrupts() -> None:
    """What a script put into the background ignores SIGINT, and so would all that it starts: a run could
    not be stopped."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
