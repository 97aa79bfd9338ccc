"""One of several choices: a dot where it is chosen, a ring where it is not, in any number of colours."""

from __future__ import annotations

from textual.widgets import RadioButton


class Choice(RadioButton):
    """A radio button that does not tell by colour alone."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]  # noqa: N802 - as the base class names it
        return "●" if self.value else "○"
