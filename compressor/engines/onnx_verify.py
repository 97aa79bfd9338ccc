"""Proofs about a candidate or package: agreement with PyTorch, and that it loads and speaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from packaging.version import Version

from compressor.engines import served
from compressor.engines.onnx_package import GRAPH_FILE
from compressor.engines.onnx_session import Decoder, open_session
from compressor.errors import CompressorError, PackageError, UnfitMachineError
from compressor.int8_cache import SCALES_FILE, CacheScales, keep_in_int8
from compressor.manifest import CacheNumerics, Manifest
from compressor.space import ModelShape, Numerics

KL_BOUND = 0.1
"""Mean divergence, nats a token, from what a package's rounded weights say that tells a wrong artefact from
one whose inputs are rounded: those cost 0.004 in the whole starter and 0.07 in one cut to half its size
untuned; a wrong slice costs several. How near a package is brought is for ``onnx_exact`` to say."""

PROMPTS = ("The capital of France is", "def add(a, b):", "Once upon a time")
CONTINUATION_TOKENS = 12


def mean_kl(reference: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions, nats; logits [tokens, vocabulary]."""
    p, q = _log_softmax(reference), _log_softmax(candidate)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def check_logits(
    reference: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32], numerics: Numerics
) -> float:
    """The mean divergence, if it is within ``KL_BOUND``. Raises ``PackageError``."""
    divergence = mean_kl(reference, candidate)
    check_divergence(divergence, numerics)
    return divergence


def check_divergence(divergence: float, numerics: Numerics) -> None:
    """Raise ``PackageError`` for a mean divergence, nats a token, beyond ``KL_BOUND``."""
    if not divergence <= KL_BOUND:
        raise PackageError(
            f"the {numerics} package's predictions differ from its weights' by {divergence:.3f} nats a "
            f"token, more than {KL_BOUND}: use 8 bits for more layers, or report this as a bug"
        )


def speak(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Open all that the endpoint will, and continue a few prompts greedily, one line each.

    Raises ``PackageError``.
    """
    check_engine(manifest)
    session, shape = open_package(folder, kv_cache=manifest.kv_cache)
    yield f"onnxruntime {ort.__version__} loads {len(manifest.architecture.layers)} layers"
    yield from served.prove(folder, shape.vocab_size)
    tokenizer = served.read_tokenizer(folder)
    for prompt in PROMPTS:
        ids = np.array([tokenizer.encode(prompt).ids], np.int64)
        continuation = greedy(session, shape, ids, CONTINUATION_TOKENS)
        yield f"{prompt!r} -> {tokenizer.decode(continuation)!r}"


def check_engine(manifest: Manifest) -> None:
    """Raise ``UnfitMachineError`` where ONNX Runtime is older than the one the package was proved with."""
    proved = manifest.created_by.get("onnxruntime", "0")
    if Version(ort.__version__).release[:2] < Version(proved).release[:2]:
        raise UnfitMachineError(
            f"the package was proved with onnxruntime {proved}, here is {ort.__version__}: "
            f'pip install "onnxruntime>={proved}"'
        )


def open_package(
    folder: Path, threads: int | None = None, *, kv_cache: CacheNumerics = "fp32"
) -> tuple[ort.InferenceSession, ModelShape]:
    """A package's session and the dimensions its caches need. Raises ``PackageError``."""
    try:
        graph = onnx.load(str(folder / GRAPH_FILE), load_external_data=False)
        if kv_cache == "int8":
            graph = keep_in_int8(graph, CacheScales.load(folder / SCALES_FILE))
        session = open_session(graph, folder, threads)
    except (OSError, CompressorError) as error:
        raise PackageError(f"{folder} does not load ({error}): copy the package again") from error
    return session, cache_shape(session)


def cache_shape(session: ort.InferenceSession) -> ModelShape:
    """What a session's inputs and outputs tell of its model: enough to decode with it."""
    keys = [entry for entry in session.get_inputs() if entry.name.endswith(".key")]
    heads, head_dim = keys[0].shape[1], keys[0].shape[3]
    return ModelShape(
        hidden_size=0,
        intermediate_size=0,
        num_layers=len(keys),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        vocab_size=session.get_outputs()[0].shape[2],
    )


def greedy(
    session: ort.InferenceSession, shape: ModelShape, ids: npt.NDArray[np.int64], tokens: int
) -> list[int]:
    """The likeliest continuation of ids [1, length]. Raises ``PackageError`` on NaN logits."""
    decoder = Decoder(session, shape, 1, ids.shape[1] + tokens)
    continuation: list[int] = []
    for _ in range(tokens):
        logits = decoder.step(ids)
        if not np.isfinite(logits).all():
            raise PackageError("the package computes logits that are not finite: make it again")
        ids = decoder.next_ids(logits)
        continuation.append(int(ids[0, 0]))
    return continuation


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
