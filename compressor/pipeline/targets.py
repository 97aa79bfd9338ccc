"""The engine that will serve, as a run uses it: it measures sub-networks, scores what ships, writes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from compressor.engines import vllm_package
from compressor.engines.host import require_free_memory
from compressor.engines.memory import required_memory_bytes
from compressor.engines.onnx_exact import Exactness
from compressor.engines.onnxruntime import OnnxCandidate, OnnxRuntimeEngine
from compressor.engines.paired import FINAL_PRECISION
from compressor.engines.vllm_score import Reader
from compressor.engines.vllm_worker import VllmWorker
from compressor.environments import REMEDY, vllm_python
from compressor.errors import InputError, UnfitMachineError
from compressor.measurement import Measurement
from compressor.pipeline.artefacts import Artefact, OnnxArtefact
from compressor.pipeline.candidates import Terms
from compressor.pipeline.context import Context
from compressor.pipeline.proof import prove
from compressor.pipeline.vllm_artefact import VllmArtefact
from compressor.profile import Profile, lacking_kernels
from compressor.request import RunRequest
from compressor.runfolder import Weights
from compressor.space import Numerics, SubNetwork
from compressor.supernet.folder import read_info


class Target(Protocol):
    """Measures and packages sub-networks of a run's super-network, and its unpruned model."""

    @property
    def reference_numerics(self) -> tuple[Numerics, ...]:
        """In what quantized numerics the engine measures the unpruned model."""
        ...

    measures_bf16: bool
    """Whether it measures that in bf16 too."""

    def bench(self, subnet: SubNetwork) -> Measurement:
        """A candidate of the search, measured for the request's time."""
        ...

    def bench_longer(self, subnet: SubNetwork, exactness: Exactness | None, seconds: float) -> Measurement:
        """A finalist as it ships, in a process of its own."""
        ...

    def bench_unpruned(self, subnet: SubNetwork, numerics: Numerics, seconds: float) -> Measurement: ...

    def beside_unpruned(
        self, subnet: SubNetwork, exactness: Exactness | None, seconds: float
    ) -> Mapping[str, float]:
        """A finalist's times over the unpruned model's in INT8, measured in turns: ``Ratio.to_dict``. Empty
        where the engine does not measure in turns; ``UnfitMachineError`` where memory lacks for both."""
        ...

    def prove(self, terms: Terms, subnet: SubNetwork) -> Exactness | None:
        """That what ships predicts what its sub-network does, and what it takes for that; None where
        there is nothing to choose."""
        ...

    def artefact(self, subnet: SubNetwork, exactness: Exactness | None) -> AbstractContextManager[Artefact]:
        """A finalist as it ships, to be scored."""
        ...

    def unpruned_artefact(
        self, subnet: SubNetwork, numerics: Numerics
    ) -> AbstractContextManager[Artefact]: ...

    def write(
        self, subnet: SubNetwork, folder: Path, fields: Mapping[str, Any], exactness: Exactness | None
    ) -> None:
        """Write a finalist's package."""
        ...

    def close(self) -> None: ...


def make_target(context: Context, largest: SubNetwork, weights: Weights) -> Target:
    """The profile's engine with these weights; ``largest`` is the super-network, beside which others may be
    measured."""
    if context.request.profile.engine == "vllm":
        return VllmTarget(context, weights)
    return OnnxTarget(context, largest, weights)


def check_target(request: RunRequest) -> None:
    """Raise ``UnfitMachineError`` where the profile's engine is not installed, ``InputError`` where it
    cannot serve what the profile asks for."""
    profile = request.profile
    if profile.engine != "vllm":
        return
    if request.cluster:
        raise InputError(
            f"profile '{profile.name}' serves with vLLM, which is measured on the machine itself: run there, "
            "without --cluster"
        )
    capability = _compute_capability(profile)
    if reason := lacking_kernels(profile.numerics, capability):
        raise InputError(f"profile '{profile.name}' can't be served here: {reason}")
    if vllm_python() is None:
        raise UnfitMachineError(f"profile '{profile.name}' serves with vLLM, which is not here: {REMEDY}")


class OnnxTarget:
    """ONNX Runtime: candidates are graphs over the super-network's quantized weights."""

    reference_numerics: tuple[Numerics, ...] = ("int8", "int4")
    measures_bf16 = False

    def __init__(self, context: Context, largest: SubNetwork, weights: Weights) -> None:
        self._context, self._largest, self._weights = context, largest, weights
        self._profile = context.request.profile
        self._in_turns = False

    @cached_property
    def engine(self) -> OnnxRuntimeEngine:
        return self._engine(self._weights.export)

    @cached_property
    def _base(self) -> OnnxRuntimeEngine:
        return self._engine(self._context.folder.unpruned.export)

    @cached_property
    def _reference(self) -> OnnxCandidate:
        return self.engine.build(self._largest, self._profile.numerics)

    def bench(self, subnet: SubNetwork) -> Measurement:
        """Measured here or on the cluster's node. Once something disturbed a measurement here, that and all
        later ones are taken in turns with the full super-network and carry their ratio to it: unless the
        model is so slow that it is run just once, or memory lacks for both."""
        workload, seconds = self._profile.workload, self._context.request.effort.bench_seconds
        if self._context.cluster is not None:
            return self._apart(self.engine, subnet, self._profile.numerics, seconds)
        candidate = self.engine.build(subnet, self._profile.numerics)
        if not self._in_turns:
            measured = self.engine.bench(candidate, workload, max_seconds=seconds)
            disturbed = "unfit" in measured.conditions and measured.repeats > 1
            if not disturbed or not self._has_room_for_both():
                return measured
            self._in_turns = True
            self._context.say(
                f"{measured.conditions['unfit'][0]}; from here on sub-networks are measured in turns with "
                "the full super-network"
            )
        return self.engine.bench_against(candidate, self._reference, workload, max_seconds=seconds)

    def bench_longer(self, subnet: SubNetwork, exactness: Exactness | None, seconds: float) -> Measurement:
        return self._apart(self.engine, subnet, self._profile.numerics, seconds, _fine(exactness))

    def bench_unpruned(self, subnet: SubNetwork, numerics: Numerics, seconds: float) -> Measurement:
        return self._apart(self._base, subnet, numerics, seconds)

    def beside_unpruned(
        self, subnet: SubNetwork, exactness: Exactness | None, seconds: float
    ) -> Mapping[str, float]:
        if self._context.cluster is not None:
            return {}
        shape = self._base.export.shape
        whole = SubNetwork(tuple(range(shape.num_layers)), (shape.intermediate_size,) * shape.num_layers)
        workload, numerics = self._profile.workload, self._profile.numerics
        both: tuple[tuple[SubNetwork, Numerics], ...] = ((subnet, numerics), (whole, "int8"))
        require_free_memory(
            sum(required_memory_bytes(shape, one, workload, kind).total for one, kind in both)
        )
        finalist = self.engine.build(subnet, numerics, _fine(exactness))
        unpruned = self._base.build(whole, "int8")
        ratio = self.engine.ratio(
            finalist, unpruned, workload, max_seconds=seconds, precision=FINAL_PRECISION
        )
        return ratio.to_dict()

    def prove(self, terms: Terms, subnet: SubNetwork) -> Exactness | None:
        return prove(self._context, terms, self.engine, subnet, self._weights.supernet)

    @contextmanager
    def artefact(self, subnet: SubNetwork, exactness: Exactness | None) -> Iterator[Artefact]:
        candidate = self.engine.build(subnet, self._profile.numerics, _fine(exactness))
        yield OnnxArtefact(self.engine, candidate)

    @contextmanager
    def unpruned_artefact(self, subnet: SubNetwork, numerics: Numerics) -> Iterator[Artefact]:
        yield OnnxArtefact(self._base, self._base.build(subnet, numerics))

    def write(
        self, subnet: SubNetwork, folder: Path, fields: Mapping[str, Any], exactness: Exactness | None
    ) -> None:
        self.engine.write(
            subnet, folder, fields, numerics=self._profile.numerics, fine_inputs=_fine(exactness)
        )

    def close(self) -> None:
        """Nothing stays."""

    def _engine(self, export: Path) -> OnnxRuntimeEngine:
        threads, workload = self._context.request.threads, self._profile.workload
        return OnnxRuntimeEngine(export, threads, kv_cache=workload.kv_cache)

    def _has_room_for_both(self) -> bool:
        """Whether the full super-network fits beside the candidate that is loaded."""
        profile, shape = self._profile, self.engine.export.shape
        needed = required_memory_bytes(shape, self._largest, profile.workload, profile.numerics).total
        try:
            require_free_memory(needed)
        except UnfitMachineError:
            return False
        return True

    def _apart(
        self,
        engine: OnnxRuntimeEngine,
        subnet: SubNetwork,
        numerics: Numerics,
        seconds: float,
        fine_inputs: tuple[str, ...] = (),
    ) -> Measurement:
        engine.require_scales()
        return self._context.bench(
            engine.export.folder,
            subnet,
            self._profile.workload,
            numerics=numerics,
            threads=self._context.request.threads,
            max_seconds=seconds,
            fine_inputs=fine_inputs,
        )


def _compute_capability(profile: Profile) -> str:
    """Of the GPU that is here, else of the profile's; nothing of a CPU."""
    if profile.device.kind != "cuda":
        return ""
    if torch.cuda.is_available():
        return ".".join(map(str, torch.cuda.get_device_capability()))
    return profile.device.compute_capability


class VllmTarget:
    """vLLM, here or in its own environment: candidates have made-up weights, what ships is scored there."""

    measures_bf16 = True

    def __init__(self, context: Context, weights: Weights) -> None:
        self._context, self._supernet = context, weights.supernet
        self._profile = context.request.profile

    @cached_property
    def reference_numerics(self) -> tuple[Numerics, ...]:
        """What GPU users would pick instead, as far as the card has kernels for it; on a CPU INT8."""
        if self._profile.device.kind != "cuda":
            return ("int8",)
        known: tuple[Numerics, ...] = ("fp8", "int8", "int4")
        capability = _compute_capability(self._profile)
        return tuple(numerics for numerics in known if not lacking_kernels(numerics, capability))

    @cached_property
    def _python(self) -> Path:
        python = vllm_python()
        if python is None:
            raise UnfitMachineError(f"vLLM is not installed here: {REMEDY}")
        return python

    @cached_property
    def _worker(self) -> VllmWorker:
        return VllmWorker(self._python)

    def bench(self, subnet: SubNetwork) -> Measurement:
        seconds = self._context.request.effort.bench_seconds
        return self._bench(self._supernet, subnet, self._profile.numerics, seconds)

    def bench_longer(self, subnet: SubNetwork, exactness: Exactness | None, seconds: float) -> Measurement:
        """From its package, run as its server runs it, by a vLLM that has just started: what one leaves
        behind would count into the next one's memory."""
        del exactness
        self.close()
        with self._on_disk(self._supernet, subnet, self._profile.numerics) as folder:
            return self._bench(folder, subnet, self._profile.numerics, seconds, package=True)

    def bench_unpruned(self, subnet: SubNetwork, numerics: Numerics, seconds: float) -> Measurement:
        return self._bench(self._context.folder.base, subnet, numerics, seconds)

    def beside_unpruned(
        self, subnet: SubNetwork, exactness: Exactness | None, seconds: float
    ) -> Mapping[str, float]:
        del subnet, exactness, seconds
        return {}

    def prove(self, terms: Terms, subnet: SubNetwork) -> Exactness | None:
        """Nothing: a vLLM package is compared with what was meant as it is written."""
        del terms, subnet
        return None

    def artefact(self, subnet: SubNetwork, exactness: Exactness | None) -> AbstractContextManager[Artefact]:
        del exactness
        return self._written(self._supernet, subnet, self._profile.numerics)

    def unpruned_artefact(self, subnet: SubNetwork, numerics: Numerics) -> AbstractContextManager[Artefact]:
        return self._written(self._context.folder.base, subnet, numerics)

    def write(
        self, subnet: SubNetwork, folder: Path, fields: Mapping[str, Any], exactness: Exactness | None
    ) -> None:
        del exactness
        self._package(self._supernet, subnet, folder, fields, self._profile.numerics)

    def close(self) -> None:
        """End the vLLM that measures: it holds memory."""
        self._worker.close()

    def _bench(
        self, model: Path, subnet: SubNetwork, numerics: Numerics, seconds: float, *, package: bool = False
    ) -> Measurement:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what this process freed but holds is vLLM's to take
        return self._worker.bench(
            model,
            subnet,
            self._profile.workload,
            numerics=numerics,
            threads=self._context.request.threads,
            max_seconds=seconds,
            package=package,
        )

    @contextmanager
    def _written(self, model: Path, subnet: SubNetwork, numerics: Numerics) -> Iterator[Artefact]:
        """A package on the run's disk for as long as it is scored, by a vLLM of its own."""
        self.close()
        kept = self._context.folder.path / f"scored-parts-{self._weights_of(model)}"
        with self._on_disk(model, subnet, numerics) as folder:
            yield VllmArtefact(Reader(folder, numerics, subnet.to_dict(), self._python, kept))

    @contextmanager
    def _on_disk(self, model: Path, subnet: SubNetwork, numerics: Numerics) -> Iterator[Path]:
        """A package in the run's folder, gone at the end of the block."""
        folder = self._context.folder.path / f"package-of-{subnet.digest}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            fields = {"name": subnet.digest, "base_model": "run"}
            self._package(model, subnet, folder, fields, numerics)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _package(
        self, model: Path, subnet: SubNetwork, folder: Path, fields: Mapping[str, Any], numerics: Numerics
    ) -> None:
        vllm_package.write_package(
            model,
            subnet,
            folder,
            fields,
            numerics=numerics,
            narrow=self._context.narrow,
            symmetric=self._profile.device.kind == "cuda",
        )

    def _weights_of(self, model: Path) -> str:
        """Hash of a folder's weights, without reading them."""
        if model == self._context.folder.base:
            return str(self._context.folder.result("base")["weights"])
        return read_info(model).weights_hash


def _fine(exactness: Exactness | None) -> tuple[str, ...]:
    return exactness.fine_inputs if exactness else ()
