"""How much memory serving takes, computed from shapes alone before anything is built.

What ONNX Runtime 1.32 holds, read from a process's memory map and checked in tests: every matrix
packed anew, with one fp32 sum a block and its scale in fp32; the embedding a second time, in place in
the mapped file; the rotary tables; the session's own, a share of it for each layer's nodes; and for its
arena a little more than the widest moment of a layer, over all prompt tokens at once, with holes where
widths differ. What Python takes is not counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from compressor.engines.base import MemoryEstimate
from compressor.heap import give_back_freed
from compressor.profile import EngineName, Profile, Workload
from compressor.space import (
    BYTES_PER_ELEMENT,
    QUANT_BLOCK,
    SCALE_BYTES,
    ModelShape,
    Numerics,
    SubNetwork,
    in_numerics,
    kv_cache_bytes,
    weight_bytes,
)

if TYPE_CHECKING:
    from compressor.engines.vllm_schemes import VllmNumerics

_PACKING_BYTES = {8: 4 + (4 - SCALE_BYTES), 4: 4 + (4 - SCALE_BYTES) + 1.5}
"""Of a block, by its bits: its sum, and what its scale grows by; in 4 bits a little more, as measured."""
_ARENA_SLACK, _ARENA_HOLES = 1.05, 0.6
"""The arena over the widest moment of a layer: with one width, and what many widths add at most."""

_SESSION_BYTES, _LAYER_BYTES = 14 * 2**20, 460 * 2**10
"""Kernels and threads of a session, and what each layer's nodes take in it."""

VLLM_QUANTIZED = ("int8", "int4", "fp8")
VLLM_ELEMENT = 2
"""Bytes of a number that vLLM keeps in floating point: bf16."""
VLLM_MOST_TOKENS = 8192
"""Tokens that vLLM takes at once, at most, measured, scored and served: more make it no faster and take
memory from the cache."""
VLLM_BLOCK_TOKENS = 128
"""Tokens of a block of vLLM's key-value cache on CPUs, of several on GPUs."""


def required_memory_bytes(
    shape: ModelShape,
    subnet: SubNetwork,
    workload: Workload,
    numerics: Numerics = "int8",
    engine: EngineName = "onnxruntime",
) -> MemoryEstimate:
    """Weights, key-value cache and activations of serving ``workload`` as a static batch."""
    if engine == "vllm":
        return _vllm_memory(shape, subnet, workload, numerics)
    quantized = numerics in ("int8", "int4")
    element = 4 if quantized else int(BYTES_PER_ELEMENT[numerics])
    weights = weight_bytes(shape, subnet, numerics)
    if quantized:
        weights += (
            rope_bytes(shape)
            + _packing_bytes(shape, in_numerics(subnet, numerics))
            + _embedding_bytes(shape, in_numerics(subnet, numerics))
        )
    tokens = workload.prompt_tokens + workload.output_tokens
    kept = 1 if workload.kv_cache == "int8" else element
    cache = kv_cache_bytes(shape, subnet, tokens, workload.concurrency, kept)
    return MemoryEstimate(weights, cache, _activation_bytes(shape, subnet, workload, element))


def served_memory(shape: ModelShape, subnet: SubNetwork, profile: Profile) -> MemoryEstimate:
    """The same for a profile's workload, numerics and engine."""
    return required_memory_bytes(shape, subnet, profile.workload, profile.numerics, profile.engine)


def shipped_weight_bytes(
    shape: ModelShape, subnet: SubNetwork, numerics: Numerics = "int8", engine: EngineName = "onnxruntime"
) -> int:
    """Bytes of the weights as the engine's package holds them.

    vLLM's quantized ones have embeddings, head and norms in bf16.
    """
    if engine == "vllm" and numerics in VLLM_QUANTIZED:
        from compressor.engines.vllm_schemes import packaged_bytes

        return packaged_bytes(shape, subnet, cast("VllmNumerics", numerics))
    return weight_bytes(shape, subnet, numerics)


def vllm_cache_bytes(layers: int, kv_size: int, workload: Workload, element: int = VLLM_ELEMENT) -> int:
    """Whole blocks of keys and values for every request, with one for each to grow and one more."""
    blocks = -(-(workload.prompt_tokens + workload.output_tokens) // VLLM_BLOCK_TOKENS) + 1
    return 2 * layers * kv_size * element * VLLM_BLOCK_TOKENS * (blocks * workload.concurrency + 1)


def vllm_batch_tokens(workload: Workload) -> int:
    """Tokens that vLLM is told to take at once, for which it makes room as it starts."""
    return min(VLLM_MOST_TOKENS, max(2048, workload.concurrency * workload.prompt_tokens))


def package_bytes(shape: ModelShape, subnet: SubNetwork, numerics: Numerics = "int8") -> int:
    """Bytes of a package's ``model.onnx.data``: the weights and the rotary embedding's frequencies."""
    return weight_bytes(shape, subnet, numerics) + 4 * (shape.head_dim // 2)


def rope_bytes(shape: ModelShape) -> int:
    """Cosines and sines, fp32 [context length, head_dim / 2] each, computed as the graph loads."""
    return 2 * 4 * shape.max_position_embeddings * (shape.head_dim // 2)


def resident_bytes() -> int:
    """Memory of this process that is resident now, what it freed but still holds given back first."""
    give_back_freed()
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most memory of this process that was resident since ``reset_peak``."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Count ``peak_bytes`` from now on (Linux; elsewhere it counts from the process's start)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _vllm_memory(
    shape: ModelShape, subnet: SubNetwork, workload: Workload, numerics: Numerics
) -> MemoryEstimate:
    """What the measuring asks of vLLM: the cache by name, the rest by the widest moment of a layer."""
    element = 4 if numerics == "fp32" else VLLM_ELEMENT
    per_token = 4 * shape.hidden_size + 2 * (shape.q_size + 2 * shape.kv_size) + 3 * max(subnet.widths)
    logits = workload.concurrency * shape.vocab_size * (element + 4)
    return MemoryEstimate(
        shipped_weight_bytes(shape, subnet, numerics, "vllm"),
        vllm_cache_bytes(subnet.depth, shape.kv_size, workload, element),
        element * vllm_batch_tokens(workload) * per_token + logits,
    )


def _packing_bytes(shape: ModelShape, subnet: SubNetwork) -> int:
    matrices = [(shape.vocab_size, shape.hidden_size, subnet.head_bits)]
    for width, bits in zip(subnet.widths, subnet.bits, strict=True):
        of_layer = (*shape.attention_matrices(), *shape.mlp_matrices(width))
        matrices += [(n, k, bits) for n, k in of_layer]
    return int(sum(n * -(-k // QUANT_BLOCK[bits]) * _PACKING_BYTES[bits] for n, k, bits in matrices))


def _embedding_bytes(shape: ModelShape, subnet: SubNetwork) -> int:
    """The tied embedding, read in place beside its packed twin, the head; 0 where it is no twin."""
    if not shape.tie_word_embeddings:
        return 0
    bits = subnet.embed_bits
    block = QUANT_BLOCK[bits]
    return shape.vocab_size * shape.hidden_size // block * (block * bits // 8 + 4)


def _activation_bytes(shape: ModelShape, subnet: SubNetwork, workload: Workload, element: int) -> int:
    slack = _ARENA_SLACK + _ARENA_HOLES * (1 - 1 / max(1, len(set(subnet.widths))))
    session = _SESSION_BYTES + _LAYER_BYTES * len(subnet.layers)
    attention = 2 * (shape.q_size + 2 * shape.kv_size)
    per_token = 4 * shape.hidden_size + 6 * max(subnet.widths, default=0) + attention
    tokens = workload.prompt_tokens * workload.concurrency
    logits = 2 * workload.concurrency * shape.vocab_size
    return session + int(slack * element * (tokens * per_token + logits))


def _status_bytes(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import psutil

        return int(psutil.Process().memory_info().rss)
    line = next(line for line in text.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
