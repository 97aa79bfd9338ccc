"""``python -m tui [RUN]``: the wizard, new or attached to a run folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ESCAPE_MS = "25"
"""How long Escape waits for the rest of a key's sequence. Textual's own 100 ms can be felt."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="compress tui", description="The wizard.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="run folder to open or re-attach to")
    asked = parser.parse_args()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        sys.exit("error: the wizard needs a terminal; `compress --help` shows the command line")
    if asked.run is not None and not (asked.run / "run.json").is_file():
        sys.exit(f"error: {asked.run} holds no run: `compress tui` alone starts one")
    os.environ.setdefault("ESCDELAY", ESCAPE_MS)
    from tui.app import ANSI_DARK, DARK, make_app

    make_app(asked.run, theme=DARK if has_many_colours() else ANSI_DARK).run()


def has_many_colours() -> bool:
    """Whether the terminal says that it shows more than 16 colours."""
    return "COLORTERM" in os.environ or "256" in os.environ.get("TERM", "")


if __name__ == "__main__":
    main()
