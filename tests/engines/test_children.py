"""Children end with their parent, however that ends, and with them what they started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from compressor.engines.children import end_child, run_child, start_child

SLEEPER = [sys.executable, "-c", "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"]


def gone(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_child_takes_its_own_children_along(tmp_path: Path) -> None:
    child = start_child(SLEEPER, tmp_path)
    for _ in range(100):
        if started := psutil.Process(child.pid).children():
            break
        time.sleep(0.05)
    end_child(child)
    assert child.returncode == -signal.SIGKILL and all(gone(one.pid) for one in started)


def test_what_a_child_says_and_how_it_ended_is_told(tmp_path: Path) -> None:
    done = run_child([sys.executable, "-c", "import sys; print(input()); sys.exit(3)"], "hello\n", tmp_path)
    assert (done.returncode, done.output) == (3, "hello\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_parent_that_is_killed_leaves_no_child(number: signal.Signals) -> None:
    program = (
        "import sys, time; from pathlib import Path; from compressor.engines.children import start_child\n"
        "print(start_child(['sleep', '60'], Path('.')).pid, flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    assert gone(child)
