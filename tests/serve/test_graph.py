"""A graph in parts computes what the whole does, may pause between them, and holds nothing twice."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compressor.errors import PackageError
from serve.kvcache import KeyValueCache
from serve.model import Chunk, Model, open_engine
from serve.package import ServedPackage, open_package

CONTEXT = 64
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module", params=["tiny_package", "narrow_package"])
def package(request: pytest.FixtureRequest) -> ServedPackage:
    """Keys and values are kept in fp32, then in INT8."""
    return open_package(request.getfixturevalue(request.param))


def make_model(package: ServedPackage, layers_each: int | None) -> Model:
    engine = open_engine(package.graph, 1, layers_each, scales=package.cache_scales())
    shape = engine.cache_shape(package.kv_heads, package.head_dim, CONTEXT)
    return Model(engine, KeyValueCache(shape, 3))


def test_parts_compute_what_the_whole_graph_does_to_the_last_bit(package):
    whole, parts = make_model(package, None), make_model(package, 1)
    assert whole.parts == 1
    assert parts.parts > 1
    for row in range(3):
        assert np.array_equal(whole.prefill(row, PROMPT), parts.prefill(row, PROMPT))
        every, same = whole.score(row, PROMPT[:7]), parts.score(row, PROMPT[:7])
        assert len(every) == 7
        assert np.array_equal(every, same)
    for first, tokens in [(0, [7, 8, 9]), (1, [10, 11]), (2, [12]), (0, [13])]:
        assert np.array_equal(whole.decode(tokens, first), parts.decode(tokens, first))


def test_a_chunk_may_pause_while_its_row_moves_and_others_decode(package):
    expected = make_model(package, None).prefill(0, PROMPT)
    model = make_model(package, 1)
    model.prefill(0, PROMPT[:3])
    chunk, row = Chunk(PROMPT), 1
    while (logits := model.advance(row, chunk)) is None:
        model.decode([9])
        model.cache.swap(row, 3 - row)
        row = 3 - row
    assert np.array_equal(logits, expected)
    assert model.cache.rows[row].tokens == PROMPT
    assert model.cache.rows[row].pending == 0


def test_no_part_holds_what_another_has(package):
    graph = open_engine(package.graph, 1, 1).graph
    weights = [
        entry.name
        for part in graph.parts
        for entry in onnx.load_from_string(part.model).graph.initializer
        if np.prod(entry.dims) > 64
    ]
    assert len(weights) == len(set(weights))
    assert all(isinstance(values, np.ndarray) for values in graph.shared.values())


def test_a_graph_that_cannot_be_served_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(PackageError, match="copy it again"):
        open_engine(path, 1)
    value = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["input_ids"], ["logits"])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.FLOAT, [1])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [ids], [value])), path)
    with pytest.raises(PackageError, match="package it again"):
        open_engine(path, 1)
