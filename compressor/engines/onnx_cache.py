"""The scales of a super-network's INT8 key-value cache, from texts that it writes itself."""

from __future__ import annotations

import os

import numpy as np

from compressor.engines.onnx_graph import build_graph
from compressor.engines.onnx_session import Decoder, open_session
from compressor.engines.onnx_store import UNQUANTIZED, Export
from compressor.errors import PackageError
from compressor.int8_cache import SCALES_FILE, CacheScales
from compressor.space import Numerics, SubNetwork

CALIBRATION_SEQUENCES, CALIBRATION_TOKENS = 8, 64


def cache_scales(export: Export, threads: int | None = None) -> CacheScales:
    """The scales for a whole super-network, kept beside its export; made when first asked for.

    They span what it keeps of texts that it writes itself, each from a token drawn at random.
    Raises ``PackageError`` where they cannot be kept.
    """
    path = export.folder / SCALES_FILE
    if not path.is_file():
        partial = path.with_name(f"{SCALES_FILE}.tmp{os.getpid()}")
        try:
            _calibrated(export, threads).save(partial)
            partial.replace(path)
        except OSError as error:
            raise PackageError(
                f"{path} could not be written ({error}): free disk space and try again"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    return CacheScales.load(path)


def _calibrated(export: Export, threads: int | None) -> CacheScales:
    shape = export.shape
    layers = tuple(range(shape.num_layers))
    most = max((bits for bits in export.bits if bits != UNQUANTIZED), default=8)
    widths = (shape.intermediate_size,) * len(layers)
    whole = SubNetwork(layers, widths, (most,) * len(layers), (most, most))
    numerics: Numerics = "bf16" if set(export.bits) == {UNQUANTIZED} else "int8"
    graph = build_graph(shape, export.constants, export.tensors(whole, numerics))
    tokens = min(CALIBRATION_TOKENS, export.constants.context_length)
    session = open_session(graph, export.folder, threads)
    decoder = Decoder(session, shape, CALIBRATION_SEQUENCES, tokens)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, shape.vocab_size, (CALIBRATION_SEQUENCES, 1))
    for _ in range(tokens):
        logits = decoder.step(ids)[:, -1]
        ids = (logits + rng.gumbel(size=logits.shape)).argmax(-1)[:, None]  # drawn by their probability
    return CacheScales.of(decoder.caches)
