"""The ledger: an SQLite database of every evaluation and measurement ever paid for.

One row an evaluation, committed before the next one starts, so that a run killed at any point
loses at most the evaluation in flight. It gives resume, de-duplication and re-planning.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from compressor.errors import RunConflictError
from compressor.space import SubNetwork

SCHEMA_VERSION = 1
Status = Literal["ok", "failed", "infeasible"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
    id INTEGER PRIMARY KEY,
    subnet TEXT NOT NULL,
    weights TEXT NOT NULL,
    task TEXT NOT NULL,
    numerics TEXT NOT NULL,
    device TEXT NOT NULL,
    engine TEXT NOT NULL,
    workload TEXT NOT NULL,
    architecture TEXT NOT NULL,
    status TEXT NOT NULL,
    metrics TEXT NOT NULL,
    details TEXT NOT NULL,
    items BLOB,
    cost_s REAL NOT NULL,
    created_at REAL NOT NULL,
    UNIQUE (subnet, weights, task, numerics, device, engine, workload)
);
CREATE TABLE IF NOT EXISTS curves (
    curve TEXT NOT NULL, step INTEGER NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (curve, step)
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Key:
    """What makes two evaluations the same one.

    ``subnet`` is ``SubNetwork.digest``; ``weights`` the hash of the super-network's weights; ``task``
    names what was asked with its split, few-shot count, limit and seed (``measure`` for a speed
    measurement); ``device``, ``engine`` and ``workload`` are empty where they do not matter.
    """

    subnet: str
    weights: str
    task: str
    numerics: str
    device: str = ""
    engine: str = ""
    workload: str = ""


@dataclass(frozen=True)
class Row:
    """One evaluation. ``metrics`` are the figures; ``details`` whatever explains them."""

    key: Key
    subnet: SubNetwork
    metrics: Mapping[str, float]
    status: Status = "ok"
    details: Mapping[str, object] = field(default_factory=dict)
    items: bytes | None = None
    cost_s: float = 0.0
    created_at: float = 0.0
    id: int = 0


class Ledger:
    """A run's database. Threads may share it; other processes may read while one writes."""

    def __init__(self, path: Path | str) -> None:
        """Open or create the database. Raises ``RunConflictError`` for a damaged or alien file."""
        self.path = Path(path)
        self._lock = threading.RLock()
        with self._using():
            self._db = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA_VERSION):
                raise RunConflictError(
                    f"{self.path} was written by another version of this program "
                    f"(schema {version}, this one reads {SCHEMA_VERSION}): start a new run folder"
                )
            with self._db:
                self._db.executescript(_SCHEMA)
                self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def close(self) -> None:
        self._db.close()

    def get(self, key: Key) -> Row | None:
        """The evaluation under this key, or None."""
        found = list(self._select(**key.__dict__))
        return found[0] if found else None

    def put(self, row: Row) -> Row:
        """Commit a row to disk before returning; an earlier row under the same key is kept."""
        values = (
            *row.key.__dict__.values(),
            json.dumps(row.subnet.to_dict()),
            row.status,
            json.dumps(dict(row.metrics)),
            json.dumps(dict(row.details)),
            row.items,
            row.cost_s,
            row.created_at or time.time(),
        )
        columns = (
            "subnet, weights, task, numerics, device, engine, workload, architecture, status, "
            "metrics, details, items, cost_s, created_at"
        )
        marks = ", ".join("?" * len(values))
        with self._using(), self._db:
            self._db.execute(f"INSERT OR IGNORE INTO evaluations ({columns}) VALUES ({marks})", values)
        stored = self.get(row.key)
        assert stored is not None
        return stored

    def forget_failed(self, detail: str) -> int:
        """Delete failed evaluations whose details name this; how many there were."""
        found = [row.id for row in self._select(status="failed") if row.details.get(detail)]
        with self._using(), self._db:
            self._db.executemany("DELETE FROM evaluations WHERE id = ?", [(number,) for number in found])
        return len(found)

    def rows(self, **where: str) -> list[Row]:
        """Rows in the order they were paid for, filtered by key columns or ``status``."""
        return list(self._select(**where))

    def record_curve(self, curve: str, step: int, value: float) -> None:
        """A point of a training curve; a resumed run overwrites the steps that it repeats."""
        with self._using(), self._db:
            self._db.execute("INSERT OR REPLACE INTO curves VALUES (?, ?, ?)", (curve, step, value))

    def end_curves(self, curves: Sequence[str], step: int) -> None:
        """Forget these curves' points after the last step: those of an earlier, longer training."""
        with self._using(), self._db:
            self._db.executemany(
                "DELETE FROM curves WHERE curve = ? AND step > ?", [(curve, step) for curve in curves]
            )

    def curve(self, curve: str) -> list[tuple[int, float]]:
        sql = "SELECT step, value FROM curves WHERE curve = ? ORDER BY step"
        with self._using():
            return list(self._db.execute(sql, (curve,)))

    def set_fact(self, name: str, value: object) -> None:
        """A named JSON value that belongs to the whole run (predictor quality, reference points)."""
        with self._using(), self._db:
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def fact(self, name: str) -> object | None:
        with self._using():
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def _select(self, **where: str) -> Iterator[Row]:
        allowed = {*Key.__dataclass_fields__, "status"}
        if not set(where) <= allowed:
            raise ValueError(f"unknown columns {set(where) - allowed}")
        clause = " AND ".join(f"{name} = ?" for name in where) or "1"
        sql = (
            "SELECT id, subnet, weights, task, numerics, device, engine, workload, architecture, status, "
            f"metrics, details, items, cost_s, created_at FROM evaluations WHERE {clause} ORDER BY id"
        )
        with self._using():
            records = self._db.execute(sql, tuple(where.values())).fetchall()
        for record in records:
            yield Row(
                id=record[0],
                key=Key(*record[1:8]),
                subnet=SubNetwork.from_dict(json.loads(record[8])),
                status=record[9],
                metrics=json.loads(record[10]),
                details=json.loads(record[11]),
                items=record[12],
                cost_s=record[13],
                created_at=record[14],
            )

    @contextmanager
    def _using(self) -> Iterator[None]:
        """One thread at a time, and SQLite's complaints as an error that names the file and what to do."""
        try:
            with self._lock:
                yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.OperationalError as error:
            raise RunConflictError(
                f"{self.path} cannot be read or written ({error}): free disk space, check the folder, "
                "and go on with --resume"
            ) from error
        except sqlite3.DatabaseError as error:
            raise RunConflictError(
                f"{self.path} is not a readable ledger ({error}): restore it or start a new run folder"
            ) from error


@contextmanager
def open_ledger(path: Path | str) -> Iterator[Ledger]:
    """A ledger that is closed at the end of the block."""
    ledger = Ledger(path)
    try:
        yield ledger
    finally:
        ledger.close()
