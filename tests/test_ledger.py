"""The ledger: what is committed survives anything, is paid for once, and is told apart by its key."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.errors import RunConflictError
from compressor.ledger import Key, Ledger, Row, open_ledger
from compressor.space import SubNetwork

SUBNET = SubNetwork((0, 2), (64, 128), (8, 4))
KEY = Key(SUBNET.digest, "weights", "agreement/search", "int8", "cpu", "onnxruntime", "64+16x1")


def row(key: Key = KEY, accuracy: float = 0.5) -> Row:
    return Row(key, SUBNET, {"accuracy": accuracy}, details={"seed": 1}, items=b"\x01\x00", cost_s=2.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def test_a_row_comes_back_whole_from_another_connection(path):
    with open_ledger(path) as ledger:
        ledger.put(row())
    with open_ledger(path) as ledger:
        found = ledger.get(KEY)
    assert found is not None
    assert found.created_at > 0 and found.id == 1
    assert replace(found, created_at=0.0, id=0) == row()


@pytest.mark.parametrize("column", list(Key.__dataclass_fields__))
def test_evaluations_that_differ_in_one_part_of_the_key_are_two(path, column):
    other = replace(KEY, **{column: "another"})
    with open_ledger(path) as ledger:
        ledger.put(row())
        assert ledger.get(other) is None
        ledger.put(row(other, 0.9))
        assert ledger.get(KEY).metrics == {"accuracy": 0.5}
        assert ledger.get(other).metrics == {"accuracy": 0.9}
        assert len(ledger.rows()) == 2


def test_what_was_paid_for_first_is_kept(path):
    with open_ledger(path) as ledger:
        ledger.put(row())
        assert ledger.put(row(accuracy=0.9)).metrics == {"accuracy": 0.5}
        assert len(ledger.rows()) == 1


def test_rows_come_in_the_order_paid_and_filtered(path):
    keys = [replace(KEY, subnet=name) for name in "cab"]
    with open_ledger(path) as ledger:
        for key in keys:
            ledger.put(row(key))
        ledger.put(replace(row(replace(KEY, task="other")), status="failed"))
        assert [r.key.subnet for r in ledger.rows(task=KEY.task)] == ["c", "a", "b"]
        assert [r.key.task for r in ledger.rows(status="failed")] == ["other"]
        with pytest.raises(ValueError, match="price"):
            ledger.rows(price="low")


def test_a_failure_is_remembered_with_its_reason(path):
    with open_ledger(path) as ledger:
        ledger.put(Row(KEY, SUBNET, {}, "failed", {"error": "out of memory"}))
        found = ledger.get(KEY)
    assert (found.status, found.details) == ("failed", {"error": "out of memory"})


def test_curves_overwrite_repeated_steps(path):
    with open_ledger(path) as ledger:
        for step, value in [(2, 1.0), (1, 3.0), (2, 0.5)]:
            ledger.record_curve("super", step, value)
        ledger.record_curve("sub", 1, 9.0)
        ledger.record_curve("winner sub", 2, 7.0)
        assert ledger.curve("super") == [(1, 3.0), (2, 0.5)]
        ledger.end_curves(["super", "sub"], 1)
        assert ledger.curve("super") == [(1, 3.0)]
        assert ledger.curve("sub") == [(1, 9.0)]
        assert ledger.curve("winner sub") == [(2, 7.0)], "another training's"


def test_facts_are_json_values(path):
    with open_ledger(path) as ledger:
        assert ledger.fact("tau") is None
        ledger.set_fact("tau", {"20": [0.5, None]})
        ledger.set_fact("tau", {"28": [0.75]})
        assert ledger.fact("tau") == {"28": [0.75]}


WRITER = """
import sys
from compressor.ledger import Key, Ledger, Row
from compressor.space import SubNetwork
ledger = Ledger(sys.argv[1])
for index in range(100000):
    subnet = SubNetwork((0,), (index + 1,))
    ledger.put(Row(Key(subnet.digest, "w", "t", "int8"), subnet, {"accuracy": index}, items=bytes(1000)))
    print(index, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_committed(path):
    """kill -9 between or during commits: every row reported is there, and the file is sound."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=_environment()
    ) as writer:
        reported = [int(writer.stdout.readline()) for _ in range(25)]
        writer.send_signal(signal.SIGKILL)
        reported += [int(line) for line in writer.stdout.read().split()]
    with open_ledger(path) as ledger:
        rows = ledger.rows()
        assert len(reported) <= len(rows) <= len(reported) + 1
        assert [r.metrics["accuracy"] for r in rows] == list(range(len(rows)))
        ledger.put(row())
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_writer_and_readers_at_once_see_whole_rows(path):
    with open_ledger(path) as ledger:
        ledger.put(row())
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER.replace("100000", "40"), str(path)],
            stdout=subprocess.DEVNULL,
            env=_environment(),
        )
        for _ in range(2)
    ]
    counts = []
    while any(w.poll() is None for w in writers):
        with open_ledger(path) as reader:
            rows = reader.rows()
            assert all(set(r.metrics) == {"accuracy"} for r in rows)
            counts.append(len(rows))
    assert [w.returncode for w in writers] == [0, 0]
    assert counts == sorted(counts)
    with open_ledger(path) as ledger:
        assert len(ledger.rows()) == 41  # both writers paid for the same forty


def test_threads_may_share_a_ledger(path):
    with open_ledger(path) as ledger:
        keys = [replace(KEY, subnet=str(index)) for index in range(60)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda key: ledger.put(row(key)), keys))
        assert [r.key for r in found] == keys
        assert len(ledger.rows()) == 60


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\x00" + bytes(200)])
def test_a_damaged_file_is_named_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(RunConflictError, match=r"ledger\.sqlite.*not a readable ledger"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_ledger_damaged_in_the_middle_says_so(path):
    with open_ledger(path) as ledger:
        for index in range(200):
            ledger.put(row(replace(KEY, subnet=str(index))))
    with path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(RunConflictError, match="not a readable ledger"), open_ledger(path) as ledger:
        ledger.rows()


def test_a_ledger_of_a_later_version_is_refused(path):
    Ledger(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(RunConflictError, match="schema 99"):
        Ledger(path)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RunConflictError, match="nowhere"):
        Ledger(tmp_path / "nowhere" / "ledger.sqlite")


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
