"""Keys and values in INT8: close to fp32 ones, and the same however a prompt is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from compressor.engines.onnx_cache import cache_scales
from compressor.engines.onnx_export import export
from compressor.engines.onnx_graph import build_graph
from compressor.engines.onnx_session import Decoder, open_session
from compressor.engines.onnx_store import Export, open_export
from compressor.engines.onnx_verify import mean_kl
from compressor.errors import InputError, PackageError
from compressor.int8_cache import SCALES_FILE, CacheScales, keep_in_int8
from compressor.space import SubNetwork
from tests.conftest import make_tiny_model
from tests.engines.test_onnx_graph import make_relative

SUBNET = SubNetwork((0, 2, 3), (128, 64, 32))
IDS = np.random.default_rng(0).integers(0, 512, (2, 48))
FAMILIES = ["llama", "grouped", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def exported(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export(tiny_model_folder, tmp_path_factory.mktemp("int8-cache") / "export", (8,))


def decoders(exported: Export, batch: int = 1, capacity: int = 64) -> list[Decoder]:
    """With the cache in fp32, and in INT8."""
    graph = build_graph(exported.shape, exported.constants, exported.tensors(SUBNET))
    narrow = keep_in_int8(graph, cache_scales(exported, 1).of_layers(SUBNET.layers))
    return [
        Decoder(open_session(each, exported.folder, 1), exported.shape, batch, capacity)
        for each in (graph, narrow)
    ]


def read(decoder: Decoder, ids: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Logits after each of consecutive pieces, [batch, pieces, vocabulary]."""
    ends = np.cumsum(pieces)
    starts = ends - pieces
    return np.stack(
        [decoder.step(ids[:, a:b])[:, -1].copy() for a, b in zip(starts, ends, strict=True)], axis=1
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [[16] + [1] * 24, [1] * 24, [20, 9, 2, 1, 1, 15]], ids=str)
def test_it_predicts_as_the_fp32_cache_does(
    tiny_model_folder: Path, tmp_path: Path, family: str, pieces: list[int]
) -> None:
    if family in ("llama", "grouped"):
        folder = make_tiny_model(tmp_path / "model", num_key_value_heads=2 if family == "llama" else 1)
    else:
        folder = make_relative(tiny_model_folder, tmp_path / "model", family)
    wide, narrow = (read(each, IDS[:1], pieces) for each in decoders(export(folder, tmp_path / "export")))
    assert mean_kl(wide[0], narrow[0]) < 0.02
    assert np.abs(wide - narrow).max() < 0.1 * np.abs(wide).max()


def test_sequences_of_a_batch_do_not_mix(exported: Export) -> None:
    pieces = [16] + [1] * 24
    together = read(decoders(exported, batch=2)[1], IDS, pieces)
    for row in range(2):
        alone = read(decoders(exported)[1], IDS[row : row + 1], pieces)
        assert np.abs(together[row] - alone[0]).max() < 1e-4


def test_a_sequence_begun_anew_sees_nothing_of_the_last(exported: Export) -> None:
    decoder = decoders(exported)[1]
    first = read(decoder, IDS[:1], [16, 1, 1, 4])
    read(decoder, IDS[1:], [48])
    decoder.restart()
    assert np.array_equal(read(decoder, IDS[:1], [16, 1, 1, 4]), first)


def test_a_prompt_read_in_pieces_predicts_what_it_does_read_at_once(exported: Export) -> None:
    narrow = decoders(exported)[1]
    whole = read(narrow, IDS[:1], [48])[:, -1]
    for pieces in ([24, 24], [2, 46], [46, 2], [16] * 3):
        narrow.restart()
        assert np.array_equal(read(narrow, IDS[:1], pieces)[:, -1], whole)


def test_what_is_kept_are_the_rounded_keys_and_values(exported: Export) -> None:
    scales = cache_scales(exported).of_layers(SUBNET.layers)
    kinds = decoders(exported)
    for decoder in kinds:
        decoder.step(IDS[:1, :16])
        decoder.step(IDS[:1, 16:17])  # by ONNX Runtime's own rounding
    exact, kept = (decoder.caches[0] for decoder in kinds)
    for part, numbers, integers in zip((scales.keys, scales.values), exact, kept, strict=True):
        assert integers.dtype == np.int8 and integers.shape == (1, exported.shape.num_kv_heads, 17, 16)
        step = part[0][:, None]
        expected = np.clip(numbers, -127 * step, 127 * step)
        assert (np.abs(integers * step - expected) <= 0.51 * step).all()


def test_scales_span_what_the_model_keeps_and_are_made_once(exported: Export, monkeypatch) -> None:
    scales = cache_scales(exported)
    dims = (4, exported.shape.num_kv_heads, exported.shape.head_dim)
    assert scales.keys.shape == scales.values.shape == dims
    wide = decoders(exported, capacity=48)[0]
    wide.step(IDS[:1])
    for layer, kept in zip(SUBNET.layers, wide.caches, strict=True):
        for part, numbers in zip((scales.keys, scales.values), kept, strict=True):
            beyond = np.abs(numbers) > 127 * part[layer][:, None]
            assert beyond.mean() < 0.02
    monkeypatch.setattr("compressor.engines.onnx_cache._calibrated", None)
    assert np.array_equal(cache_scales(open_export(exported.folder)).keys, scales.keys)


def test_the_graph_given_is_left_as_it_was(exported: Export) -> None:
    graph = build_graph(exported.shape, exported.constants, exported.tensors(SUBNET))
    before = graph.SerializeToString()
    changed = keep_in_int8(graph, cache_scales(exported).of_layers(SUBNET.layers))
    assert graph.SerializeToString() == before
    past = next(entry for entry in changed.graph.input if entry.name == "past_key_values.0.key")
    assert past.type.tensor_type.elem_type == onnx.TensorProto.INT8


def test_scales_of_another_model_are_refused(exported: Export) -> None:
    graph = build_graph(exported.shape, exported.constants, exported.tensors(SUBNET))
    scales = cache_scales(exported).of_layers(SUBNET.layers)
    fewer = CacheScales(scales.keys[:, :1], scales.values[:, :1])
    for others in (scales.of_layers((0,)), fewer):
        with pytest.raises(InputError, match="another model's"):
            keep_in_int8(graph, others)


def test_a_damaged_file_of_scales_is_told(exported: Export, tmp_path: Path) -> None:
    path = tmp_path / SCALES_FILE
    with pytest.raises(PackageError, match=r"missing.*fp32"):
        CacheScales.load(path)
    cache_scales(exported).save(path)
    assert np.array_equal(CacheScales.load(path).values, cache_scales(exported).values)
    whole = path.read_bytes()
    for damaged in (whole[:100], b"", b"no scales", b"\x93NUMPY"):
        path.write_bytes(damaged)
        with pytest.raises(PackageError, match="damaged"):
            CacheScales.load(path)
    zero = CacheScales(np.zeros((4, 2, 16), np.float32), np.ones((4, 2, 16), np.float32))
    zero.save(path)
    with pytest.raises(PackageError, match="no scales"):
        CacheScales.load(path)
