"""A run folder keeps what was asked, knows what is done, and lets one process in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.errors import InputError, RunConflictError
from compressor.runfolder import RunFolder, digest, replace_folder, write_json


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"model": "starter"})


def test_a_new_run_remembers_what_was_asked(folder: RunFolder) -> None:
    assert RunFolder.open_existing(folder.path).request() == {"model": "starter"}


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_is_kept(folder: RunFolder) -> None:
    with pytest.raises(RunConflictError, match="--resume"):
        RunFolder.create(folder.path, {"model": "other"})
    assert folder.request() == {"model": "starter"}


def test_a_folder_with_other_things_in_it_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not empty"):
        RunFolder.create(tmp_path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"request": {}}', '{"format_version": 99, "request": {}}']
)
def test_a_damaged_run_file_is_named(folder: RunFolder, damage: str) -> None:
    folder.run_file.write_text(damage)
    with pytest.raises(RunConflictError, match=r"run\.json"):
        RunFolder.open_existing(folder.path)


def test_a_stage_is_done_for_the_same_inputs_only(folder: RunFolder) -> None:
    folder.mark_done("supernet", {"seed": 0}, {"weights": "abc"})
    assert folder.is_done("supernet", {"seed": 0})
    assert not folder.is_done("supernet", {"seed": 1})
    assert folder.result("supernet") == {"weights": "abc"}


def test_the_result_of_an_unfinished_stage_says_how_to_go_on(folder: RunFolder) -> None:
    with pytest.raises(InputError, match="--resume"):
        folder.result("search")


def test_a_second_process_on_the_run_says_so_and_leaves(folder: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from compressor.runfolder import RunFolder\n"
        "f = RunFolder(Path(sys.argv[1]))\n"
        "with f.locked(): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None and other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunConflictError, match=str(other.pid)), folder.locked():
            pass
        assert folder.in_use
    finally:
        other.communicate("")
    assert not folder.in_use
    with folder.locked():
        pass


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "package"
    target.mkdir()
    (target / "old").write_text("old")

    def half(path: Path) -> None:
        path.mkdir()
        (path / "new").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(target, half)
    assert [p.name for p in tmp_path.rglob("*")] == ["package", "old"]


def test_written_json_is_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": [1, 2]}


def test_the_digest_ignores_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_a_log_that_waits_for_its_run_does_not_make_the_folder_taken(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text("")
    assert RunFolder.create(tmp_path, {"model": "starter"}).request() == {"model": "starter"}
