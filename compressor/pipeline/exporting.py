"""Sub-networks of a run, or whole models, written for other runtimes than the one that was measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast, get_args

from compressor import cpu, device, models
from compressor.engines import gguf_file, hf_folder, onnx_export, onnx_package, vllm_package
from compressor.engines.onnx_store import UNQUANTIZED
from compressor.engines.vllm_score import Reader
from compressor.environments import vllm_python
from compressor.errors import InputError, UnfitMachineError
from compressor.events import Listener, Message
from compressor.manifest import Accuracy
from compressor.pipeline.accuracy import AccuracyTask
from compressor.pipeline.deliver import accuracy_entry
from compressor.pipeline.vllm_artefact import VllmArtefact
from compressor.pipeline.winner import winner_of
from compressor.profile import EngineName
from compressor.request import stored_request
from compressor.runfolder import RUN_FILE, RunFolder
from compressor.space import Numerics, SubNetwork


@dataclass(frozen=True)
class Origin:
    """The weights a sub-network is cut from, and what its metadata says of where it comes from."""

    supernet: Path
    subnet: SubNetwork
    fields: Mapping[str, Any]
    narrow: bool
    """Whether vLLM's INT8 weights stay within 7 bits: for a CPU on which sums of full ones saturate."""
    symmetric: bool
    """Whether vLLM's INT8 activations are symmetric, as its kernels for GPUs want them."""


@dataclass(frozen=True)
class Format:
    """How a format is written. ``write`` takes the origin, target, numerics and whether to pad."""

    suffix: str
    numerics: str
    write: Callable[[Origin, Path, str, bool], object]


def export(
    source: Path, name: str, pick: str, numerics: str, portable: bool, out: Path | None, listener: Listener
) -> Path:
    """Write the sub-network ``pick`` of a run, or all of a model folder, in the format ``name``.

    Returns what was written, whole. Raises ``InputError``, ``PackageError``.
    """
    if name not in FORMATS:
        raise InputError(f"no format '{name}': use {', '.join(FORMATS)}")
    form = FORMATS[name]
    if portable and name != "vllm":
        raise InputError(f"--portable is for --format vllm, not for {name}: leave it out")
    target = out or source.with_name(f"{source.resolve().name}{form.suffix}")
    if target.exists():
        raise InputError(f"{target} exists: delete it, or choose another name with --out")
    form.write(_origin(source, pick, listener), target, numerics or form.numerics, portable)
    return target


def package_for(run: Path, engine: str, pick: str, out: Path | None, listener: Listener) -> Path:
    """The sub-network ``pick`` of a finished run as a package for ``engine`` (or the run's own); its folder.

    In the run's own engine it is measured again and scored as it ships. A run in ONNX Runtime may also be
    packaged for vLLM: scored where that is installed, else the manifest says no accuracy, and not measured.
    Raises ``InputError``, ``PackageError``, ``UnfitMachineError``.
    """
    from compressor.pipeline.run import package_pick, reopened

    own = stored_request(RunFolder.open_existing(run)).profile.engine
    if engine in ("", own):
        return package_pick(run, pick, out, listener)
    if engine not in get_args(EngineName):
        raise InputError(f"no engine '{engine}': use {' or '.join(get_args(EngineName))}")
    if engine != "vllm":
        raise InputError(
            f"the run measured in {own} and has no quantized weights for {engine}: leave --engine out, or "
            "use `compress export RUN --format onnx`"
        )
    target = out or run / f"package-{pick}-vllm"
    with reopened(run, listener) as workshop:
        origin = _of_run(workshop.context.folder, workshop.picked(pick).subnet)

        def score(folder: Path) -> list[Accuracy]:
            return _scored_in_vllm(folder, origin.subnet, workshop.task, listener)

        vllm_package.write_package(
            origin.supernet,
            origin.subnet,
            target,
            origin.fields,
            narrow=origin.narrow,
            symmetric=origin.symmetric,
            score=score,
        )
    return target


def _scored_in_vllm(
    folder: Path, subnet: SubNetwork, task: AccuracyTask, listener: Listener
) -> list[Accuracy]:
    """A package's accuracy on the report split; none, and a warning, where vLLM isn't or fails."""
    python = vllm_python()
    if python is None:
        listener(Message("vLLM is not installed here: the package's accuracy is not scored", "warning"))
        return []
    listener(Message("scoring the package in vLLM"))
    try:
        with TemporaryDirectory() as scratch:
            reader = Reader(folder, "int8", subnet.to_dict(), python, Path(scratch))
            score = task.score_artefact(VllmArtefact(reader), "report")
    except UnfitMachineError as error:
        listener(Message(f"{error}; it is written without its accuracy", "warning"))
        return []
    return [accuracy_entry(task, score.metrics())]


def _origin(source: Path, pick: str, listener: Listener) -> Origin:
    if not (source / RUN_FILE).is_file():
        return _whole_model(source)
    folder = RunFolder.open_existing(source)
    return _of_run(folder, winner_of(folder) if pick == "winner" else _picked(source, pick, listener))


def _of_run(folder: RunFolder, subnet: SubNetwork) -> Origin:
    model = models.resolve(stored_request(folder).model)
    fields = {
        "name": f"{Path(model.name).name}-{subnet.digest}",
        "base_model": model.name,
        "base_revision": model.revision,
        "license": model.license,
    }
    on_gpu = stored_request(folder).profile.device.kind == "cuda"
    narrow = not on_gpu and cpu.this_saturates()
    return Origin(folder.weights_of(subnet.digest).supernet, subnet, fields, narrow, on_gpu)


def _whole_model(folder: Path) -> Origin:
    model = models.resolve(str(folder))
    if model.kind != "folder":
        raise InputError(f"{folder} is neither a run nor a Hugging Face model folder: name one of these")
    shape = models.read_shape(model)
    layers = tuple(range(shape.num_layers))
    fields = {"name": model.name, "base_model": model.name, "license": model.license}
    on_gpu = bool(device.detect().gpus)
    whole = SubNetwork(layers, (shape.intermediate_size,) * len(layers))
    return Origin(folder, whole, fields, cpu.this_saturates() and not on_gpu, on_gpu)


def _picked(path: Path, pick: str, listener: Listener) -> SubNetwork:
    from compressor.pipeline.run import reopened

    with reopened(path, listener) as workshop:
        return workshop.picked(pick).subnet


def _write_gguf(origin: Origin, target: Path, numerics: str, _portable: bool) -> None:
    gguf_file.write_gguf(origin.supernet, origin.subnet, target, origin.fields, numerics=numerics)


def _write_hf(origin: Origin, target: Path, numerics: str, _portable: bool) -> None:
    hf_folder.write_hf_folder(origin.supernet, origin.subnet, target, origin.fields, numerics=numerics)


def _write_vllm(origin: Origin, target: Path, numerics: str, portable: bool) -> None:
    vllm_package.write_package(
        origin.supernet,
        origin.subnet,
        target,
        origin.fields,
        numerics=numerics,
        portable=portable,
        narrow=origin.narrow,
        symmetric=origin.symmetric,
    )


def _write_onnx(origin: Origin, target: Path, numerics: str, _portable: bool) -> None:
    own = {*origin.subnet.bits, *origin.subnet.outer}
    everywhere = {"int8": own, "int4": {4}, "bf16": {UNQUANTIZED}}
    if numerics not in everywhere:
        raise InputError(f"ONNX Runtime packages are written in {', '.join(everywhere)}, not in '{numerics}'")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        bits = tuple(everywhere[numerics])
        exported = onnx_export.export(origin.supernet, Path(scratch) / "export", bits)
        onnx_package.write_package(
            exported, origin.subnet, target, origin.fields, numerics=cast(Numerics, numerics)
        )


FORMATS: Mapping[str, Format] = {
    "gguf": Format(".gguf", "q8_0", _write_gguf),
    "hf": Format("-hf", "bf16", _write_hf),
    "vllm": Format("-vllm", "int8", _write_vllm),
    "onnx": Format("-onnx", "int8", _write_onnx),
}
