"""Measuring on another machine: its node carries the resource ``profile/NAME``, measurements are Ray tasks.

The export's files go to a node once and stay there under their hash; a candidate is then its layers,
widths and bits. A node needs Ray, onnxruntime and this package, not torch. Ray's own retries move a
measurement to another node of the profile when one drops out; where none is left that is an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.engines.apart import BenchRequest, answer, measurement_of
from compressor.engines.onnx_store import INDEX_FILE, WEIGHTS_FILE
from compressor.errors import UnfitMachineError
from compressor.int8_cache import SCALES_FILE
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import Numerics, SubNetwork

PIP_LINE = "measuring on another machine needs Ray: `pip install -e '.[ray]'` in the clone"
CHUNK_BYTES = 64 * 2**20
RETRIES = 2
"""Further attempts of a measurement whose node dropped out."""
GRACE_SECONDS = 30.0
"""How long a profile may be without a node before its measurements are given up."""
POLL_SECONDS = 1.0
START_SECONDS = 180.0
"""Time allowed beyond the measuring itself: for starting a worker and sending the weights."""


def resource_name(profile: str) -> str:
    """What a node carries that is the device of a profile."""
    return f"profile/{profile}"


@contextmanager
def joined(address: str, profile: str) -> Iterator[Cluster]:
    """A cluster's nodes for a profile, left at the end of the block.

    Raises ``UnfitMachineError`` where Ray is not installed, no cluster answers at ``address`` or none
    of its nodes carries the profile.
    """
    ray = _ray()
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UnfitMachineError(
            f"no Ray cluster answers at {address} ({_first_line(error)}): start its head with "
            "`ray start --head --port 6379`, and name HOST:6379"
        ) from None
    try:
        cluster = Cluster(profile)
        cluster.require_node()
        yield cluster
    finally:
        ray.shutdown()


class Cluster:
    """The nodes of a profile in the cluster that this process has joined. Make it with ``joined``."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self._sent: dict[str, dict[str, Any]] = {}

    @property
    def resource(self) -> str:
        return resource_name(self.profile)

    def nodes(self) -> list[str]:
        """Ids of the living nodes that carry the profile."""
        return [
            str(node["NodeID"])
            for node in _ray().nodes()
            if node["Alive"] and node["Resources"].get(self.resource, 0) > 0
        ]

    def require_node(self) -> None:
        """Raise ``UnfitMachineError`` unless a living node carries the profile."""
        if not self.nodes():
            raise UnfitMachineError(
                f"no node of the cluster is the device '{self.profile}': on that device run "
                f"`compress join HEAD:6379 --profile {self.profile}`"
            )

    def device(self) -> str:
        """The name of the device that measures, as it says itself."""
        answer: str = self._ask(_describe_there, (), START_SECONDS)
        return answer

    def bench(
        self,
        export_folder: Path,
        subnet: SubNetwork,
        workload: Workload,
        *,
        numerics: Numerics = "int8",
        threads: int | None = None,
        max_seconds: float = 10.0,
        fine_inputs: Sequence[str] = (),
    ) -> Measurement:
        """As ``apart.bench_apart``, on a node of the profile; the conditions say which.

        Raises ``InputError`` or ``UnfitMachineError``; also where the node dropped out and no other
        took over.
        """
        request = BenchRequest(subnet, workload, numerics, threads, max_seconds, fine_inputs)
        asked = self._send(export_folder), request.to_dict()
        return measurement_of(self._ask(_bench_there, asked, START_SECONDS + request.allowed_seconds))

    def _send(self, export_folder: Path) -> dict[str, Any]:
        """References to the export's files, put into the object store once."""
        key = str(export_folder.resolve())
        if key not in self._sent:
            index = (export_folder / INDEX_FILE).read_text(encoding="utf-8")
            chunks = [[_ray().put(part)] for part in _chunks(export_folder / WEIGHTS_FILE)]
            digest = hashlib.sha256(index.encode()).hexdigest()[:16]
            self._sent[key] = {"digest": digest, "index": index, "chunks": chunks}
        scales = export_folder / SCALES_FILE
        return {**self._sent[key], "scales": scales.read_bytes() if scales.is_file() else b""}

    def _ask(self, function: Any, arguments: tuple[Any, ...], seconds: float) -> Any:
        """Run a function on a node of the profile, elsewhere again if that drops out."""
        ray = _ray()
        self.require_node()
        options = {"resources": {self.resource: 1}, "num_cpus": 0, "max_retries": RETRIES}
        task = ray.remote(function).options(**options).remote(*arguments)
        end = time.monotonic() + seconds
        lonely_since: float | None = None
        while time.monotonic() < end:
            ready, _ = ray.wait([task], timeout=POLL_SECONDS)
            if ready:
                return self._answer(task)
            lonely_since = None if self.nodes() else lonely_since or time.monotonic()
            if lonely_since is not None and time.monotonic() - lonely_since > GRACE_SECONDS:
                break
        ray.cancel(task, force=True)
        raise UnfitMachineError(self._lost(f"gave no answer within {seconds:.0f} s"))

    def _answer(self, task: Any) -> Any:
        ray = _ray()
        try:
            return ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise UnfitMachineError(
                f"a node of '{self.profile}' could not measure ({_first_line(error.cause)}): see its log, "
                "and check that it has this version of the package and onnxruntime"
            ) from None
        except ray.exceptions.RayError as error:
            raise UnfitMachineError(self._lost(f"dropped out ({_first_line(error)})")) from None

    def _lost(self, what: str) -> str:
        return (
            f"the node of '{self.profile}' {what}: nothing was measured; look whether the device runs, and "
            f"start it again with `compress join HEAD:6379 --profile {self.profile}`"
        )


def join(address: str, profile: str) -> list[str]:
    """The command that makes this machine a node of the cluster at ``address``, as the profile's device.

    Raises ``UnfitMachineError`` where Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UnfitMachineError(PIP_LINE)
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--address", address, "--block"),
        *("--disable-usage-stats", "--num-cpus", "0", "--resources", json.dumps({resource_name(profile): 1})),
    ]


def _bench_there(sent: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Runs on the node: one measurement, or the error that it ended with."""
    found = answer(_received(sent), request)
    if "conditions" in found:
        found["conditions"] |= _whereabouts()
    return found


def _describe_there() -> str:
    """Runs on the node: what its figures are filed under."""
    from compressor import device

    return device.detect().cpu_label


def _whereabouts() -> dict[str, Any]:
    context = _ray().get_runtime_context()
    return {"node": context.get_node_id(), "host": os.uname().nodename}


def _received(sent: Mapping[str, Any]) -> Path:
    """The export's folder on this node, its weights fetched unless they are here already."""
    folder = Path(tempfile.gettempdir()) / f"edge-compressor-{os.getuid()}" / str(sent["digest"])
    if not (folder / INDEX_FILE).is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _keep(folder / WEIGHTS_FILE, (_ray().get(chunk) for (chunk,) in sent["chunks"]))
        _keep(folder / INDEX_FILE, [str(sent["index"]).encode()])
    if sent["scales"] and not (folder / SCALES_FILE).is_file():
        _keep(folder / SCALES_FILE, [sent["scales"]])
    return folder


def _keep(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("wb") as stream:
        for part in parts:
            stream.write(part)
    partial.replace(path)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise UnfitMachineError(PIP_LINE) from None
    return ray


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
