"""Screens that stay built while others are shown, and come back at once."""

from __future__ import annotations

from typing import TypeVar

from textual.events import ScreenResume
from textual.screen import Screen

Answer = TypeVar("Answer")


class Kept(Screen[Answer]):
    """Works its styles out anew, half the work of coming back, only where the theme changed meanwhile."""

    _styled_in = ""

    def _on_screen_resume(self, event: ScreenResume) -> None:
        event.refresh_styles = self._styled_in not in ("", self.app.theme)
        self._styled_in = self.app.theme
