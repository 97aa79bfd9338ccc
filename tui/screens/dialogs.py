"""Small windows over a step: help, open a run, pick a path, leave, terminal too small."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar, Literal

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, DirectoryTree, Input, Label, OptionList, Static
from textual.widgets.option_list import Option

from compressor.runfolder import RUN_FILE
from tui.helptext import styled
from tui.screens.kept import Kept
from tui.widgets.line import Line

Leaving = Literal["leave", "stop", "stay"]
RUNS = Path("runs")


class HelpDialog(Kept[None], ModalScreen[None]):
    """What a step is for and which keys it knows. One for all steps: ``tell`` changes its text."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,f1", "app.pop_screen", "Close")]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog dialog-large"):
            with VerticalScroll():
                yield Line("", id="help")
            yield Label("Esc closes", classes="hint")

    def tell(self, text: str) -> None:
        self.query_one("#help", Line).update(styled(text))
        self.query_one(VerticalScroll).scroll_home(animate=False)


class LeaveDialog(ModalScreen[Leaving]):
    """Asks what becomes of a run that is at work."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss('stay')", "Stay")]

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run_path = run

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label("A run is at work", classes="heading")
            yield Static(
                f"It can go on in the background; `compress tui {self.run_path}` comes back to it. "
                "Or stop it: what is finished is kept, and it can go on later.",
                markup=False,
            )
            with Horizontal(classes="buttons"):
                yield Button("Let it run", id="leave", variant="primary", compact=True)
                yield Button("Stop and keep", id="stop", compact=True)
                yield Button("Stay here", id="stay", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        answers: dict[str, Leaving] = {"leave": "leave", "stop": "stop", "stay": "stay"}
        self.dismiss(answers[str(event.button.id)])


class OpenRunDialog(ModalScreen[Path | None]):
    """Picks a run folder: those under ``runs/``, or any other by its path."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label("Open a run", classes="heading")
            runs = sorted(p.parent for p in RUNS.glob(f"*/{RUN_FILE}"))
            yield OptionList(*(Option(str(run), id=str(run)) for run in runs), id="runs", compact=True)
            yield Input(placeholder="or the path of another run folder", compact=True)
            yield Static("", id="fault", markup=False)
            yield Label("Enter opens, Esc closes", classes="hint")

    def on_mount(self) -> None:
        listed = self.query_one(OptionList)
        listed.display = listed.option_count > 0
        self.query_one(OptionList if listed.display else Input).focus()

    @on(OptionList.OptionSelected)
    def _listed(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(Path(str(event.option.id)))

    @on(Input.Submitted)
    def _typed(self, event: Input.Submitted) -> None:
        path = Path(event.value.strip()).expanduser()
        if not (path / RUN_FILE).is_file():
            self.query_one("#fault", Static).update(f"{path} holds no run (no {RUN_FILE})")
            return
        self.dismiss(path)


class _FilteredTree(DirectoryTree):
    """Folders, and the files that are wanted."""

    def __init__(self, path: Path, wanted: Callable[[Path], bool]) -> None:
        super().__init__(path)
        self.wanted = wanted

    def filter_paths(self, paths: Iterable[Path]) -> Iterable[Path]:
        return [p for p in paths if not p.name.startswith(".") and (p.is_dir() or self.wanted(p))]


class PathDialog(ModalScreen[Path | None]):
    """Picks a file or a folder from a tree."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss", "Close")]

    def __init__(self, title: str, folders: bool, suffixes: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.heading = title
        self.folders = folders
        self.suffixes = suffixes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog dialog-large"):
            yield Label(self.heading, classes="heading")
            yield _FilteredTree(Path.cwd(), lambda p: p.suffix in self.suffixes)
            yield Input(value=str(Path.cwd()), compact=True)
            keys = "Enter opens a folder, Ctrl+S takes it" if self.folders else "Enter takes the file"
            yield Label(f"{keys}; type a path below the tree to look elsewhere; Esc closes", classes="hint")

    def key_ctrl_s(self) -> None:
        node = self.query_one(DirectoryTree).cursor_node
        if self.folders and node is not None and node.data is not None:
            self.dismiss(node.data.path)

    @on(DirectoryTree.FileSelected)
    def _file(self, event: DirectoryTree.FileSelected) -> None:
        if not self.folders:
            self.dismiss(event.path)

    @on(Input.Submitted)
    def _elsewhere(self, event: Input.Submitted) -> None:
        path = Path(event.value.strip()).expanduser()
        if path.is_dir():
            tree = self.query_one(DirectoryTree)
            tree.path = path
            tree.focus()
        elif path.is_file() and not self.folders:
            self.dismiss(path)


class TooSmallDialog(ModalScreen[None]):
    """Covers everything while the terminal is smaller than the screens need."""

    def __init__(self, needed: tuple[int, int]) -> None:
        super().__init__()
        self.needed = needed

    def compose(self) -> ComposeResult:
        yield Static("", id="too-small")

    def on_mount(self) -> None:
        self._tell()

    def on_resize(self) -> None:
        self._tell()

    def _tell(self) -> None:
        size = self.app.size
        self.query_one("#too-small", Static).update(
            f"This terminal is {size.width}×{size.height}.\n"
            f"Make it {self.needed[0]}×{self.needed[1]} or larger.\nCtrl+Q leaves."
        )
