"""``python -m tui.tethered MODULE ...``: runs a module that ends with whoever started it.

Its standard input is a pipe that only the wizard holds; when the wizard is gone, however it went, the pipe
ends, and the module is asked to end as Ctrl-C in its terminal would ask it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

PATIENCE_S = 5.0


def main() -> None:
    sys.argv = sys.argv[1:]
    threading.Thread(target=end_with_input, daemon=True).start()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def end_with_input() -> None:
    """Wait for the end of standard input, then end this process: politely, then not."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
