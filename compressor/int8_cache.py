"""Keys and values kept in INT8: a graph changed for it as it is loaded, and the scales that this takes.

A package's graph keeps them in fp32, which is what stock onnxruntime-genai takes; ``keep_in_int8`` is
applied to it, or to a part of it, before ONNX Runtime sees it. GroupQueryAttention reads INT8 caches with
kernels that are fast for one new token and slow for many. So a step of one token uses them, and a pass
over more widens what the cache holds and attends in fp32. New keys and values are rounded before anything
attends to them, so that a prompt read in pieces predicts what it does read at once.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compressor.errors import InputError, PackageError

SCALES_FILE = "kv_scales.npz"
ATTENTION = "GroupQueryAttention"
OPSET = 24
"""The first with TensorScatter, which ONNX Runtime does in place where past and present share memory."""
STEPS = 127
HEADROOM = 1.25
"""Of a scale over what was seen in calibration text; what goes beyond is clipped."""

_QUERY, _PAST, _LENGTHS, _TOTAL, _ROTATIONS, _SCALES = 0, slice(3, 5), 5, 6, slice(7, 9), 12
"""Places among GroupQueryAttention's inputs."""
_SEVERAL, _NEW, _BEFORE = "int8_cache.several", "int8_cache.new", "int8_cache.before"
_SIZES = "int8_cache.sizes"


@dataclass(frozen=True)
class CacheScales:
    """What one step of INT8 stands for: ``keys`` and ``values`` are fp32 [layers, kv heads, head dim]."""

    keys: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]

    @classmethod
    def of(cls, caches: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]) -> CacheScales:
        """From each layer's keys and values, fp32 [sequences, kv heads, tokens, head dim].

        Rotation turns a key's channel pairs with the position, so each of a pair gets the pair's length.
        """
        halves = [np.split(keys, 2, axis=-1) for keys, _ in caches]
        lengths = [np.tile(np.hypot(*pair), 2) for pair in halves]
        values = [np.abs(values) for _, values in caches]
        return cls(_steps(lengths), _steps(values))

    def of_layers(self, layers: Sequence[int]) -> CacheScales:
        return CacheScales(self.keys[list(layers)], self.values[list(layers)])

    def save(self, path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, keys=self.keys, values=self.values)

    @classmethod
    def load(cls, path: Path) -> CacheScales:
        """Raises ``PackageError`` where the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as found:
                scales = cls(found["keys"], found["values"])
        except FileNotFoundError:
            raise PackageError(
                f"{path} is missing, without which keys and values cannot be kept in INT8: "
                "package again, or keep them in fp32"
            ) from None
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise PackageError(f"{path} is damaged ({error}): copy the package again") from None
        for part in (scales.keys, scales.values):
            if part.dtype != np.float32 or part.ndim != 3 or not (np.isfinite(part) & (part > 0)).all():
                raise PackageError(f"{path} holds no scales of a key-value cache: copy the package again")
        return scales


def keep_in_int8(graph: ModelProto, scales: CacheScales) -> ModelProto:
    """The same decoder, or the same part of one, with its keys and values in INT8.

    Past and present must share memory, as ``Decoder`` and ``compress serve`` have it.
    Raises ``InputError`` where the scales are not this decoder's.
    """
    changed = ModelProto()
    changed.CopyFrom(graph)
    nodes = list(changed.graph.node)
    del changed.graph.node[:]
    constants: dict[str, npt.NDArray[np.generic]] = {}
    caches: set[str] = set()
    for node in nodes:
        if node.op_type == ATTENTION:
            if not caches:
                changed.graph.node.extend(_lengths(node))
                constants |= _CONSTANTS | {_SIZES: _sizes(node, scales)}
            steps = _steps_of(node, scales)
            for name, step in steps.items():
                constants |= {name: step, f"{name}.flat": step.reshape(-1)}
            caches.update(node.input[_PAST], node.output[1:3])
            node = _either(node, list(steps))
        changed.graph.node.append(node)
    for entry in (*changed.graph.input, *changed.graph.output):
        if entry.name in caches:
            entry.type.tensor_type.elem_type = TensorProto.INT8
    changed.graph.initializer.extend(numpy_helper.from_array(of, name) for name, of in constants.items())
    for entry in changed.opset_import:
        if not entry.domain:
            entry.version = max(entry.version, OPSET)
    return changed


_CONSTANTS: dict[str, npt.NDArray[np.generic]] = {
    "int8_cache.one": np.array([1], np.int64),
    "int8_cache.zero": np.array([0], np.int64),
    "int8_cache.axis": np.array([2], np.int64),
    "int8_cache.end": np.array([2**62], np.int64),
    "int8_cache.least": np.array(-STEPS, np.float32),
    "int8_cache.most": np.array(STEPS, np.float32),
}


def _steps(sizes: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Scales [layers, kv heads, head dim] for numbers of these sizes; never 0."""
    largest = np.stack([size.max(axis=(0, 2)) for size in sizes])
    return np.maximum(HEADROOM * largest / STEPS, 1e-6).astype(np.float32)


def _steps_of(attention: NodeProto, scales: CacheScales) -> dict[str, npt.NDArray[np.float32]]:
    """Scales of an attention's keys and values, [1, kv heads, 1, head dim], by their names in the graph."""
    layer = int(attention.input[_PAST][0].split(".")[-2])
    layers, heads, _ = scales.keys.shape
    if layer >= layers or heads != _attribute(attention, "kv_num_heads").i:
        raise InputError(
            f"there are scales for {layers} layers of {heads} key heads, and layer {layer} has "
            f"{_attribute(attention, 'kv_num_heads').i}: they are another model's"
        )
    parts = (part[layer][None, :, None] for part in (scales.keys, scales.values))
    return {f"{past}.scale": part for past, part in zip(attention.input[_PAST], parts, strict=True)}


def _sizes(attention: NodeProto, scales: CacheScales) -> npt.NDArray[np.int64]:
    """How many of the packed numbers of a token are queries, keys and values."""
    _, heads, head_dim = scales.keys.shape
    return np.array([_attribute(attention, "num_heads").i, heads, heads], np.int64) * np.int64(head_dim)


def _lengths(attention: NodeProto) -> list[NodeProto]:
    """How many tokens are new and how many came before, int64 [1], and whether several are new."""
    query, total = attention.input[_QUERY], attention.input[_TOTAL]
    return [
        helper.make_node("Shape", [query], [_NEW], start=1, end=2),
        helper.make_node("Reshape", [total, "int8_cache.one"], ["int8_cache.total_1"]),
        helper.make_node("Cast", ["int8_cache.total_1"], ["int8_cache.total"], to=TensorProto.INT64),
        helper.make_node("Sub", ["int8_cache.total", _NEW], [_BEFORE]),
        helper.make_node("Greater", [_NEW, "int8_cache.one"], ["int8_cache.several_1"]),
        helper.make_node("Squeeze", ["int8_cache.several_1"], [_SEVERAL]),
    ]


def _either(attention: NodeProto, scales: Sequence[str]) -> NodeProto:
    """Attention of one new token with INT8 kernels, of several in fp32."""
    stem, outputs = attention.output[0], list(attention.output)
    return helper.make_node(
        "If",
        [_SEVERAL],
        outputs,
        f"{stem}.either",
        then_branch=_in_fp32(attention, scales),
        else_branch=_in_int8(attention, scales),
    )


def _in_int8(attention: NodeProto, scales: Sequence[str]) -> onnx.GraphProto:
    node = NodeProto()
    node.CopyFrom(attention)
    del node.output[:]
    node.output.extend(f"{name}.one" for name in attention.output)
    node.input.extend([""] * (_SCALES - len(node.input)) + list(scales))
    for name, value in (
        ("k_quant_type", "PER_CHANNEL"),
        ("v_quant_type", "PER_CHANNEL"),
        ("kv_cache_bit_width", 8),
    ):
        node.attribute.append(helper.make_attribute(name, value))
    return _branch([node], attention.output[0] + ".int8", list(node.output))


def _in_fp32(attention: NodeProto, scales: Sequence[str]) -> onnx.GraphProto:
    """Attention to what the cache holds and to new tokens as it will hold them."""
    outputs = [f"{name}.several" for name in attention.output]
    every = [f"{name}.every" for name in attention.output[1:3]]
    nodes, inputs = _rotated(attention)
    node = NodeProto()
    node.CopyFrom(attention)
    for place, (past, scale) in enumerate(zip(attention.input[_PAST], scales, strict=True)):
        nodes += [*_rounded(inputs[1 + place], f"{scale}.flat"), *_widened(past, scale)]
        inputs[1 + place] += ".kept"
        inputs.append(f"{past}.wide")
    del node.input[:]
    node.input.extend([*inputs, *attention.input[_LENGTHS : _TOTAL + 1]])
    _attribute(node, "do_rotary").i = 0
    del node.output[:]
    node.output.extend([outputs[0], *every])
    nodes.append(node)
    at = f"{outputs[0]}.at"
    nodes.append(helper.make_node("Shape", [attention.input[_LENGTHS]], [f"{at}.rows"]))
    nodes.append(helper.make_node("Expand", [_BEFORE, f"{at}.rows"], [at]))
    for past, scale, found, output in zip(attention.input[_PAST], scales, every, outputs[1:], strict=True):
        nodes += _appended(past, scale, found, at, output)
    return _branch(nodes, attention.output[0] + ".fp32", outputs)


def _rotated(attention: NodeProto) -> tuple[list[NodeProto], list[str]]:
    """New queries and keys rotated by their positions, and values: [rows, tokens, heads * head dim] each."""
    nodes: list[NodeProto] = []
    stem, parts = attention.output[0], list(attention.input[:3])
    if not parts[1]:  # packed in one
        parts = [f"{stem}.{part}" for part in ("query", "key", "value")]
        nodes.append(helper.make_node("Split", [attention.input[_QUERY], _SIZES], parts, axis=-1))
    for place, heads in enumerate(("num_heads", "kv_num_heads")):
        source, parts[place] = parts[place], f"{stem}.rotated.{place}"
        nodes.append(
            helper.make_node(
                "RotaryEmbedding",
                [source, _BEFORE, *attention.input[_ROTATIONS]],
                [parts[place]],
                domain=attention.domain,
                num_heads=_attribute(attention, heads).i,
                interleaved=_attribute(attention, "rotary_interleaved").i,
            )
        )
    return nodes, parts


def _rounded(numbers: str, scale: str) -> list[NodeProto]:
    """Numbers [..., kv heads * head dim] as INT8 keeps them, in fp32."""
    return [
        *_whole_steps(numbers, scale),
        helper.make_node("Mul", [f"{numbers}.clip", scale], [f"{numbers}.kept"]),
    ]


def _whole_steps(numbers: str, scale: str) -> list[NodeProto]:
    limits = ["int8_cache.least", "int8_cache.most"]
    return [
        helper.make_node("Div", [numbers, scale], [f"{numbers}.steps"]),
        helper.make_node("Round", [f"{numbers}.steps"], [f"{numbers}.round"]),
        helper.make_node("Clip", [f"{numbers}.round", *limits], [f"{numbers}.clip"]),
    ]


def _widened(past: str, scale: str) -> list[NodeProto]:
    """What a cache holds, in fp32."""
    bounds = ["int8_cache.zero", _BEFORE, "int8_cache.axis"]
    return [
        helper.make_node("Slice", [past, *bounds], [f"{past}.held"]),
        helper.make_node("Cast", [f"{past}.held"], [f"{past}.cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{past}.cast", scale], [f"{past}.wide"]),
    ]


def _appended(past: str, scale: str, every: str, at: str, output: str) -> list[NodeProto]:
    """The cache with what is new, in INT8: the last of ``every`` [rows, kv heads, tokens, head dim]."""
    bounds = [_BEFORE, "int8_cache.end", "int8_cache.axis"]
    return [
        helper.make_node("Slice", [every, *bounds], [f"{every}.new"]),
        *_whole_steps(f"{every}.new", scale),
        helper.make_node("Cast", [f"{every}.new.clip"], [f"{every}.int8"], to=TensorProto.INT8),
        helper.make_node("TensorScatter", [past, f"{every}.int8", at], [output], axis=2),
    ]


def _attribute(node: NodeProto, name: str) -> onnx.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def _branch(nodes: list[NodeProto], name: str, outputs: Sequence[str]) -> onnx.GraphProto:
    kinds = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT8)
    infos = [
        helper.make_tensor_value_info(output, kind, None) for output, kind in zip(outputs, kinds, strict=True)
    ]
    return helper.make_graph(nodes, name, [], infos)
