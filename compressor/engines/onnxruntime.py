"""The ONNX Runtime engine: a candidate is a graph over slices of one quantized export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from compressor.engines.bench import PRECISION, Timings, summarise, time_workload, warm_up
from compressor.engines.host import HostWatch, host_conditions
from compressor.engines.memory import peak_bytes, reset_peak, resident_bytes
from compressor.engines.onnx_cache import cache_scales
from compressor.engines.onnx_graph import Logits, build_graph
from compressor.engines.onnx_package import write_package
from compressor.engines.onnx_session import (
    CPU,
    Decoder,
    node_placement,
    open_session,
    prefill_logits,
    usable_cores,
)
from compressor.engines.onnx_store import Export, open_export
from compressor.engines.paired import Ratio, time_pair
from compressor.errors import InputError
from compressor.int8_cache import CacheScales, keep_in_int8
from compressor.manifest import CacheNumerics
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import ModelShape, Numerics, SubNetwork

SCORED_TOKENS = 1024
"""Positions whose logits are computed in one pass when scoring (0.2 GB at a vocabulary of 50k)."""

HEAVY_OPS = ("MatMulNBits", "FusedMatMul", "GroupQueryAttention")
"""Operators that take the time; those that compute shapes belong on the CPU whatever the provider."""


@dataclass
class OnnxCandidate:
    """A sub-network loaded for serving (logits of the last position only)."""

    subnet: SubNetwork
    numerics: Numerics
    session: ort.InferenceSession
    resident_bytes: int
    fine_inputs: tuple[str, ...] = ()
    _scoring: list[ort.InferenceSession] = field(default_factory=list)


class OnnxRuntimeEngine:
    """Sub-networks of one export on this machine's CPU."""

    name = "onnxruntime"

    def __init__(
        self,
        export_folder: Path,
        threads: int | None = None,
        provider: str = CPU,
        kv_cache: CacheNumerics = "fp32",
    ) -> None:
        """``threads``: of one operator; default, the cores this process may use. ``kv_cache``: how
        candidates keep keys and values."""
        self.export: Export = open_export(export_folder)
        self.threads = threads or usable_cores()
        self.provider = provider
        self.kv_cache: CacheNumerics = kv_cache

    @cached_property
    def scales(self) -> CacheScales | None:
        """Of the super-network's INT8 cache; None where that is in fp32."""
        return cache_scales(self.export, self.threads) if self.kv_cache == "int8" else None

    def require_scales(self) -> None:
        """Make them now if they are needed: a device that measures may be too small for the whole network."""
        _ = self.scales

    def build(
        self, subnet: SubNetwork, numerics: Numerics = "int8", fine_inputs: Sequence[str] = ()
    ) -> OnnxCandidate:
        """Load a sub-network: about 10 ms for its graph and 0.3 s for ONNX Runtime to pack it.

        ``fine_inputs`` names matrices that read their inputs in two INT8 passes, see ``onnx_exact``.
        """
        scales, exact = self.scales, tuple(fine_inputs)  # making scales is not the candidate's to pay for
        before = resident_bytes()
        session = self._session(subnet, numerics, "last", exact, scales)
        return OnnxCandidate(subnet, numerics, session, max(0, resident_bytes() - before), exact)

    def bench(
        self,
        candidate: OnnxCandidate,
        workload: Workload,
        *,
        max_seconds: float = 3.0,
        min_repeats: int = 3,
    ) -> Measurement:
        """TTFT, TPOT and throughput of the workload as a static batch of ``concurrency`` prompts."""
        watch, before = HostWatch(), resident_bytes()
        reset_peak()
        runner = self.runner(candidate, workload)
        timings = time_workload(runner, workload, max_seconds=max_seconds, min_repeats=min_repeats)
        return self._measurement(candidate, workload, timings, peak_bytes() - before, watch)

    def bench_against(
        self,
        candidate: OnnxCandidate,
        reference: OnnxCandidate,
        workload: Workload,
        *,
        max_seconds: float = 6.0,
        precision: float = PRECISION,
    ) -> Measurement:
        """As ``bench``, taking turns with a reference; the conditions hold its figures and the ratios."""
        other = self.runner(reference, workload)
        warm_up(other, workload)  # what it takes of memory is not the candidate's
        watch, before = HostWatch(), resident_bytes()
        reset_peak()
        runners = self.runner(candidate, workload), other
        mine, theirs, ratio = time_pair(*runners, workload, max_seconds=max_seconds, precision=precision)
        measured = self._measurement(candidate, workload, mine, peak_bytes() - before, watch)
        beside = summarise(theirs, workload)
        against = {
            "reference_ttft_ms": beside.ttft_ms,
            "reference_tpot_ms": beside.tpot_ms,
            **ratio.to_dict(),
        }
        return replace(measured, conditions={**measured.conditions, **against})

    def ratio(
        self,
        candidate: OnnxCandidate,
        reference: OnnxCandidate,
        workload: Workload,
        *,
        max_seconds: float = 6.0,
        precision: float = PRECISION,
    ) -> Ratio:
        """A candidate's times over a reference's, which may be of another export of the same shape."""
        runners = self.runner(candidate, workload), self.runner(reference, workload)
        return time_pair(*runners, workload, max_seconds=max_seconds, precision=precision)[2]

    def placement(self, subnet: SubNetwork, numerics: Numerics = "int8") -> dict[str, int]:
        """Nodes of a sub-network by the execution provider that really ran them."""
        return _by_provider(self._ran(subnet, numerics))

    def _ran(self, subnet: SubNetwork, numerics: Numerics) -> Counter[tuple[str, str]]:
        graph = self._graph(subnet, numerics, "last")
        return node_placement(graph, self.export.folder, self.export.shape, provider=self.provider)

    def runner(self, candidate: OnnxCandidate, workload: Workload) -> OnnxRunner:
        """The candidate with one batch of random prompts, for ``bench.time_once``."""
        total = workload.prompt_tokens + workload.output_tokens
        if total > self.export.constants.context_length:
            raise InputError(
                f"the workload needs {total} tokens of context, the model has "
                f"{self.export.constants.context_length}: shorten the profile's prompt or output"
            )
        return OnnxRunner(candidate.session, self.export.shape, workload)

    def logits(self, candidate: OnnxCandidate, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits of every position, fp32 [tokens, vocabulary] for ids [tokens], or with a batch axis."""
        batch = ids[None] if ids.ndim == 1 else ids
        rows = max(1, SCORED_TOKENS // batch.shape[1])
        parts = [self._prefill(candidate, batch[i : i + rows]) for i in range(0, len(batch), rows)]
        logits = np.concatenate(parts)
        return logits[0] if ids.ndim == 1 else logits

    def decoded_logits(
        self, candidate: OnnxCandidate, ids: npt.NDArray[np.int64], prompt: int
    ) -> npt.NDArray[np.float32]:
        """Logits after the first ``prompt`` of ids [tokens] read at once, then after each of the others in a
        step of its own, as when generating them: fp32 [tokens - prompt + 1, vocabulary]."""
        decoder = Decoder(candidate.session, self.export.shape, 1, len(ids))
        pieces = [ids[None, :prompt], *(ids[None, at : at + 1] for at in range(prompt, len(ids)))]
        return np.stack([decoder.step(piece)[0, -1].copy() for piece in pieces])

    def top1(self, candidate: OnnxCandidate, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The likeliest next token at every position, [batch, tokens] for ids [batch, tokens]."""
        rows = max(1, SCORED_TOKENS // ids.shape[1])
        parts = [self.logits(candidate, ids[i : i + rows]).argmax(-1) for i in range(0, len(ids), rows)]
        return np.concatenate(parts)

    def write(
        self,
        subnet: SubNetwork,
        folder: Path,
        fields: Mapping[str, Any],
        *,
        numerics: Numerics = "int8",
        fine_inputs: Sequence[str] = (),
    ) -> None:
        """Write the package of a sub-network; ``fields`` go to its manifest. Whole or absent."""
        scales = None if self.scales is None else self.scales.of_layers(subnet.layers)
        write_package(
            self.export, subnet, folder, fields, numerics=numerics, fine_inputs=fine_inputs, scales=scales
        )

    def _measurement(
        self,
        candidate: OnnxCandidate,
        workload: Workload,
        timings: Timings,
        working_bytes: int,
        watch: HostWatch,
    ) -> Measurement:
        """What was timed, with the conditions it was timed under."""
        conditions = {
            **session_conditions(candidate.session, self.threads),
            "numerics": candidate.numerics,
            **({"fine_inputs": list(candidate.fine_inputs)} if candidate.fine_inputs else {}),
            **watch.marks(),
        }
        if self.provider != CPU:
            conditions |= self._whereabouts(candidate, conditions.get("unfit", []))
        peak = candidate.resident_bytes + max(0, working_bytes)
        return summarise(timings, workload, peak_memory_bytes=peak, conditions=conditions)

    def _whereabouts(self, candidate: OnnxCandidate, reasons: list[str]) -> dict[str, Any]:
        """Where the nodes really ran, and a mark if the provider left heavy ones to the CPU."""
        ran = self._ran(candidate.subnet, candidate.numerics)
        heavy = {provider: _heavy(ran, provider) for provider, _ in ran}
        on_cpu = heavy.get(CPU, 0)
        said = f"{on_cpu} of {sum(heavy.values())} heavy nodes fell back to the CPU from {self.provider}"
        marks = [*reasons, *([said] if on_cpu else [])]
        return {"nodes": _by_provider(ran), **({"unfit": marks} if marks else {})}

    def _prefill(self, candidate: OnnxCandidate, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits of every position of ids [batch, tokens]."""
        session = self._scoring_session(candidate)
        if self.kv_cache == "fp32":
            return prefill_logits(session, self.export.shape, ids)
        decoder = Decoder(session, self.export.shape, *ids.shape)  # in whose buffer the logits live
        return decoder.step(ids).copy()

    def _scoring_session(self, candidate: OnnxCandidate) -> ort.InferenceSession:
        if not candidate._scoring:
            session = self._session(
                candidate.subnet, candidate.numerics, "all", candidate.fine_inputs, self.scales
            )
            candidate._scoring.append(session)
        return candidate._scoring[0]

    def _session(
        self,
        subnet: SubNetwork,
        numerics: Numerics,
        logits: Logits,
        fine_inputs: Sequence[str],
        scales: CacheScales | None = None,
    ) -> ort.InferenceSession:
        graph = self._graph(subnet, numerics, logits, fine_inputs)
        if scales is not None:
            graph = keep_in_int8(graph, scales.of_layers(subnet.layers))
        return open_session(graph, self.export.folder, self.threads, provider=self.provider)

    def _graph(
        self, subnet: SubNetwork, numerics: Numerics, logits: Logits, fine_inputs: Sequence[str] = ()
    ) -> onnx.ModelProto:
        export = self.export
        tensors = export.tensors(subnet, numerics)
        return build_graph(
            export.shape, export.constants, tensors, logits=logits, fine_inputs=frozenset(fine_inputs)
        )


def _by_provider(ran: Counter[tuple[str, str]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for (provider, _), nodes in ran.items():
        counts[provider] += nodes
    return dict(counts)


def _heavy(ran: Counter[tuple[str, str]], provider: str) -> int:
    return sum(nodes for (place, op), nodes in ran.items() if place == provider and op in HEAVY_OPS)


def keeps_int8(session: ort.InferenceSession) -> bool:
    """Whether a session's keys and values are in INT8."""
    return any(entry.type == "tensor(int8)" for entry in session.get_inputs())


def session_conditions(session: ort.InferenceSession, threads: int) -> dict[str, Any]:
    """Engine, provider and host of figures taken with a session."""
    return {
        "engine": f"onnxruntime {ort.__version__}",
        "provider": session.get_providers()[0],
        "threads": threads,
        **({"kv_cache": "int8"} if keeps_int8(session) else {}),
        **host_conditions(),
    }


class OnnxRunner:
    """``bench.Runner`` over a decoder with buffers for one workload."""

    def __init__(self, session: ort.InferenceSession, shape: ModelShape, workload: Workload) -> None:
        capacity = workload.prompt_tokens + workload.output_tokens
        self._decoder = Decoder(session, shape, workload.concurrency, capacity)
        self._prompts = random_prompts(shape.vocab_size, workload)
        self._next = self._prompts[:, :1]

    def prefill(self) -> None:
        self._decoder.restart()
        self._next = self._decoder.next_ids(self._decoder.step(self._prompts))

    def step(self) -> None:
        self._next = self._decoder.next_ids(self._decoder.step(self._next))

    def skip(self, tokens: int) -> None:
        self._decoder.length += tokens


def random_prompts(vocab_size: int, workload: Workload) -> npt.NDArray[np.int64]:
    """Token ids [concurrency, prompt tokens], always the same ones for a workload."""
    rng = np.random.default_rng(0)
    return rng.integers(0, vocab_size, (workload.concurrency, workload.prompt_tokens), dtype=np.int64)
