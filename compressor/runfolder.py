"""A run's folder: what was asked, which stages are done, and the lock that keeps a second process out.

run.json        what was asked, versions, seeds
stages/         one marker a finished stage, with the hash of its inputs
base/           the unpruned model as a Hugging Face folder
supernet/       the tuned super-network, neurons already sorted
engine/         exports that candidates are slices of
tuned/          the winner's weights after a fine-tuning of its own, and their export
ledger.sqlite   every evaluation
events.jsonl    what the run told the world, a line an event
run.log         what a run in the background printed
front.json  report/  package/
comparisons/    sub-networks beside other pruning methods, one file each
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import InputError, RunConflictError

RUN_FILE = "run.json"
LOG_FILE = "run.log"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Weights:
    """Where weights lie: the ``supernet`` as a Hugging Face folder, and the ``export`` of it that candidates
    are slices of."""

    supernet: Path
    export: Path


class RunFolder:
    """Paths and markers of one run. Make it with ``create`` or ``open_existing``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_file = path / RUN_FILE
        self.base = path / "base"
        self.text = path / "text.npz"
        self.supernet = path / "supernet"
        self.checkpoints = path / "checkpoints"
        self.engine = path / "engine"
        self.tuned = path / "tuned"
        self.ledger = path / "ledger.sqlite"
        self.front = path / "front.json"
        self.report = path / "report"
        self.package = path / "package"
        self.comparisons = path / "comparisons"
        self.events = path / "events.jsonl"
        self.log = path / LOG_FILE

    @property
    def unpruned(self) -> Weights:
        """The model as it came."""
        return Weights(self.base, self.engine / "base")

    @property
    def searched(self) -> Weights:
        """What the search evaluates."""
        return Weights(self.supernet, self.engine / "supernet")

    def tuned_alone(self, digest: str) -> Weights:
        """The super-network after further tuning of that sub-network alone, whose slice alone is of use."""
        return Weights(self.tuned / digest / "supernet", self.tuned / digest / "export")

    def weights_of(self, digest: str) -> Weights:
        """The best that there are of a sub-network."""
        tuned = self.tuned_alone(digest)
        if tuned.supernet.is_dir():
            return tuned
        return self.unpruned if self._packaged_free() == digest else self.searched

    @classmethod
    def create(cls, path: Path, request: Mapping[str, Any]) -> RunFolder:
        """A new run folder. Raises ``RunConflictError`` where one is, ``InputError`` for other content."""
        if (path / RUN_FILE).exists():
            raise RunConflictError(
                f"{path} holds a run already: add --resume to go on, or name another folder with --run"
            )
        if path.exists() and (not path.is_dir() or any(entry.name != LOG_FILE for entry in path.iterdir())):
            raise InputError(f"{path} is not empty and holds no run: name another folder with --run")
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.write_request(request)
        return folder

    @classmethod
    def create_or_update(cls, path: Path, request: Mapping[str, Any]) -> RunFolder:
        """The run folder at ``path``, new or not, with this request in its ``run.json``."""
        if not (path / RUN_FILE).exists():
            return cls.create(path, request)
        folder = cls.open_existing(path)
        folder.write_request(request)
        return folder

    @classmethod
    def open_existing(cls, path: Path) -> RunFolder:
        """The run folder at ``path``. Raises ``InputError`` where there is none or it is damaged."""
        folder = cls(path)
        if not folder.run_file.is_file():
            raise InputError(f"{path} holds no run: `compress --run {path}` starts one")
        folder.request()
        return folder

    def request(self) -> dict[str, Any]:
        """What was asked of this run, as ``run.json`` says."""
        try:
            data = json.loads(self.run_file.read_text(encoding="utf-8"))
            request = data["request"]
            version = data["format_version"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunConflictError(
                f"{self.run_file} is damaged ({error!r}): restore it, or start a new run folder"
            ) from error
        if version != FORMAT_VERSION or not isinstance(request, dict):
            raise RunConflictError(
                f"{self.run_file} has format {version}, not {FORMAT_VERSION}: start a new run folder"
            )
        return request

    def write_request(self, request: Mapping[str, Any]) -> None:
        write_json(self.run_file, {"format_version": FORMAT_VERSION, "request": request})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Raises ``RunConflictError`` if another one has it."""
        with (self.path / "run.lock").open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                owner = stream.read().strip() or "unknown"
                raise RunConflictError(
                    f"{self.path} is in use by process {owner}: wait for it, or choose another --run folder"
                ) from None
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield

    @property
    def in_use(self) -> bool:
        """Whether a process works on this run at the moment."""
        try:
            with self.locked():
                return False
        except RunConflictError:
            return True

    def is_done(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the stage finished with just these inputs."""
        marker = self._marker(stage)
        try:
            return bool(json.loads(marker.read_text())["inputs"] == digest(inputs))
        except (OSError, ValueError, KeyError):
            return False

    def mark_done(self, stage: str, inputs: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        write_json(self._marker(stage), {"inputs": digest(inputs), "result": result})

    def result(self, stage: str) -> dict[str, Any]:
        """What the finished stage left in its marker. Raises ``InputError`` if it never finished."""
        try:
            return dict(json.loads(self._marker(stage).read_text())["result"])
        except (OSError, ValueError, KeyError):
            raise InputError(
                f"{self.path} has not finished its {stage} stage: `compress --run {self.path} --resume`"
            ) from None

    def _packaged_free(self) -> str | None:
        """The digest of what is packaged, where that is the unpruned model itself."""
        try:
            return self.result("package").get("free")
        except InputError:
            return None

    def _marker(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"


def digest(value: Mapping[str, Any]) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or absent, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def replace_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Let ``build`` fill a new folder, then put it in the place of ``folder``; on failure nothing changes."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        build(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
