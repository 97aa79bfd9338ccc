"""The keys that work at the moment, in the last line; each can be clicked.

One widget, where Textual's own footer mounts one a key anew at every change of the focus.
"""

from __future__ import annotations

from textual.content import Content
from textual.screen import Screen

from tui.widgets.line import Line


class Keys(Line):
    """Shows the bindings of its screen and of the app that have a name."""

    def __init__(self) -> None:
        super().__init__("", id="keys")

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, self.look)
        self.look(self.screen)

    def look(self, screen: Screen[object]) -> None:
        """Show the keys again if others work now."""
        app = screen.app
        shown = {
            binding.action: (app.get_key_display(binding), binding.description, binding.key)
            for _, binding, enabled, _ in screen.active_bindings.values()
            if binding.show and binding.description and enabled
        }
        self.update(Content("  ").join(key(*parts) for parts in shown.values()))


def key(display: str, description: str, pressed: str) -> Content:
    """A key and what it does, clickable."""
    return Content.from_markup(
        f"[@click=app.simulate_key({pressed!r})][bold $footer-key-foreground]$key[/] $does[/]",
        key=display,
        does=description,
    )
