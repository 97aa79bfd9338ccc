"""Folders and files that are complete or absent, whatever fails while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import InputError, PackageError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill; it becomes ``target`` when the block ends well and is removed otherwise.

    Raises ``InputError`` where ``target`` exists and ``PackageError`` where the disk refuses.
    """
    with _whole(target) as scratch:
        scratch.mkdir(parents=True)
        yield scratch


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write a file to, as ``whole_folder``."""
    with _whole(target) as scratch:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        with scratch.open("rb") as stream:
            os.fsync(stream.fileno())


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    if target.exists():
        raise InputError(f"{target} exists: delete it or choose another name")
    scratch = target.with_name(f"{target.name}.tmp{os.getpid()}")
    _remove(scratch)
    try:
        yield scratch
        scratch.rename(target)
    except OSError as error:
        raise PackageError(
            f"{target} could not be written ({error}): free disk space and try again"
        ) from error
    finally:
        _remove(scratch)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
