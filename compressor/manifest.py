"""The package manifest: what a package is, how good and fast it is, and how to prove it whole.

``serve`` reads packages through this module alone; it needs neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import PackageError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

CacheNumerics = Literal["fp32", "int8"]
"""How ONNX Runtime keeps keys and values."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileRecord(_Record):
    """A file of the package: size and sha256 (hex)."""

    bytes: int
    sha256: str


class Accuracy(_Record):
    """A score of the artefact itself on items that the search never saw, with its 95% interval."""

    task: str
    value: float
    low: float
    high: float
    items: int


class Speed(_Record):
    """Measured in the engine that serves, on the named device, for the named workload."""

    workload: str
    device: str
    engine: str
    ttft_ms: float
    tpot_ms: float
    throughput_tok_s: float
    peak_memory_bytes: int
    conditions: dict[str, Any] = {}


class BudgetVerdict(_Record):
    """One budget of the profile against the figure measured for the sub-network that ships."""

    name: Literal["memory_gib", "ttft_ms", "tpot_ms"]
    limit: float
    measured: float
    met: bool


class Architecture(_Record):
    """The sub-network, as ``SubNetwork.to_dict`` writes it."""

    layers: list[int]
    widths: list[int]
    bits: list[int]
    outer: list[int] = Field(default=[8, 8], description="Bits of the embeddings and of the head")


class Manifest(_Record):
    """``manifest.json`` of a package."""

    format_version: int = FORMAT_VERSION
    name: str
    base_model: str
    base_revision: str = ""
    license: str = ""
    engine: Literal["onnxruntime", "vllm"]
    numerics: str
    architecture: Architecture
    parameters: int
    weight_bytes: int
    context_length: int
    divergence_nats: float | None = Field(
        default=None, description="Mean divergence from what its rounded weights say, a token"
    )
    rounding_nats: float | None = Field(
        default=None,
        description="What rounding the weights itself costs: their divergence from unrounded ones",
    )
    fine_inputs: list[str] = Field(
        default=[], description="Matrices whose inputs are not rounded, to keep the divergence within bounds"
    )
    kv_cache: CacheNumerics = Field(
        default="fp32", description="How keys and values are kept where this is measured and served"
    )
    narrow_weights: bool = Field(
        default=False, description="INT8 weights within 7 bits, for CPUs on which sums of full ones saturate"
    )
    accuracy: list[Accuracy] = []
    speed: list[Speed] = []
    budgets: list[BudgetVerdict] = []
    profile: str = ""
    created_by: dict[str, str] = Field(default={}, description="Versions of what made the package")
    files: dict[str, FileRecord] = {}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a package folder. Raises ``PackageError``."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise PackageError(
            f"{folder} is not a package: it has no {MANIFEST_NAME}; `compress package` makes one"
        )
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} is damaged ({_first_line(error)}): make the package again") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(manifest.model_dump(), indent=2) + "\n", encoding="utf-8")


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file of the folder but the manifest, by relative path."""
    names = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return {
        str(p.relative_to(folder)): FileRecord(bytes=p.stat().st_size, sha256=sha256_of(p)) for p in names
    }


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest. Raises ``PackageError`` naming the first that differs."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise PackageError(f"{folder}: {name} is missing: copy the package again")
        if path.stat().st_size != record.bytes or sha256_of(path) != record.sha256:
            raise PackageError(f"{folder}: {name} is not the file that was packaged: copy the package again")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
