"""The ONNX graph of a sub-network: LLaMA's decoder in ONNX Runtime's fused operators.

Operators (ONNX Runtime contrib domain ``com.microsoft``): MatMulNBits for every matrix,
GroupQueryAttention with rotary embedding and key-value cache, SkipSimplifiedLayerNormalization for
residual + RMSNorm, GatherBlockQuantized for the embedding. Inputs and outputs have the names and
shapes that stock onnxruntime-genai expects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx
from onnx import TensorProto, helper

from compressor.engines.onnx_store import Constants, TensorRef
from compressor.space import QUANT_BLOCK, ModelShape

MS = "com.microsoft"
OPSET = 21
MS_OPSET = 1
IR_VERSION = 10
INT8_ACTIVATIONS = 4
FP32_ACTIVATIONS = 1
LAST_START = "last_start"

Logits = Literal["last", "all"]
_ONNX_TYPES = {
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
}
_BITS_OF_BLOB = {block * bits // 8: bits for bits, block in QUANT_BLOCK.items()}
"""Bits of a matrix by the bytes of one of its blocks."""


@dataclass
class _Graph:
    """A graph under construction."""

    shape: ModelShape
    constants: Constants
    tensors: Mapping[str, TensorRef]
    accuracy_level: int
    fine_inputs: Collection[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    small: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, op: str, inputs: list[str], output: str, domain: str = MS, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], output, domain=domain, **attributes))
        return output

    def constant(self, name: str, values: list[int], dtype: int = TensorProto.INT64) -> str:
        self.small.append(helper.make_tensor(name, dtype, [len(values)], values))
        return name

    def scalar(self, name: str, value: float) -> str:
        self.small.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
        return name

    def matmul(self, x: str, stem: str, output: str, inputs: int) -> str:
        """x · Wᵀ for the matrix ``stem``, with ``inputs`` columns."""
        weight, bias = f"{stem}.weight", f"{stem}_bias"
        ref = self.tensors[weight]
        if f"{stem}.scales" not in self.tensors:
            return self._plain_matmul(x, stem, output)
        bits = _BITS_OF_BLOB[ref.dims[2]]
        attributes: dict[str, Any] = {
            "K": inputs,
            "N": ref.dims[0],
            "bits": bits,
            "block_size": QUANT_BLOCK[bits],
            "accuracy_level": self.accuracy_level,
        }
        zeros = f"{stem}.zeros"
        operands = [weight, self.scales(stem), *([zeros] if zeros in self.tensors else [])]
        if stem in self.fine_inputs:
            if inputs % QUANT_BLOCK[bits]:
                raise ValueError(
                    f"{stem} has {inputs} inputs, which are no whole blocks of {QUANT_BLOCK[bits]}"
                )
            rows = self._coarse_and_rest(x, QUANT_BLOCK[bits])
            passes = self.add("MatMulNBits", [rows, *operands], f"{output}.passes", **attributes)
            return self._sum_of_passes(passes, bias if bias in self.tensors else "", output)
        if bias in self.tensors:
            operands += [""] * (4 - len(operands)) + [bias]
        return self.add("MatMulNBits", [x, *operands], output, **attributes)

    def _coarse_and_rest(self, x: str, block: int) -> str:
        """x [batch, length, K] as what INT8 keeps of it and what it loses, [batch, 2 * length, K].

        MatMulNBits rounds each block of a row to 127 steps of its own. What is on those steps already it
        keeps, so the first half is exact, and the second is rounded 254 times finer than x would be.
        """
        rows = f"{x}.rows_{block}"
        if any(rows in node.output for node in self.nodes):
            return rows
        stem = f"{x}.{block}"
        split = self.constant(f"{stem}.split", [0, 0, -1, block])
        blocks = self.add("Reshape", [x, split], f"{stem}.blocks", "")
        largest = self.add("Abs", [blocks], f"{stem}.abs", "")
        axis = self.constant(f"{stem}.axis", [-1])
        peak = self.add("ReduceMax", [largest, axis], f"{stem}.peak", "", keepdims=1)
        step = self.add("Mul", [peak, self.scalar(f"{stem}.share", 1 / 127)], f"{stem}.step", "")
        above_0 = self.add("Max", [step, self.scalar(f"{stem}.least", 1e-30)], f"{stem}.above_0", "")
        steps = self.add("Round", [self.add("Div", [blocks, above_0], f"{stem}.scaled", "")], f"{stem}.n", "")
        coarse = self.add("Mul", [steps, above_0], f"{stem}.coarse", "")
        rest = self.add("Sub", [blocks, coarse], f"{stem}.rest", "")
        both = self.add("Concat", [coarse, rest], f"{stem}.both", "", axis=1)
        return self.add("Reshape", [both, self.constant(f"{stem}.flat", [0, 0, -1])], rows, "")

    def _sum_of_passes(self, passes: str, bias: str, output: str) -> str:
        halves = [f"{passes}.coarse", f"{passes}.rest"]
        self.nodes.append(
            helper.make_node("Split", [passes], halves, f"{passes}.split", axis=1, num_outputs=2)
        )
        if not bias:
            return self.add("Add", halves, output, "")
        return self.add("Add", [self.add("Add", halves, f"{passes}.sum", ""), bias], output, "")

    def _plain_matmul(self, x: str, stem: str, output: str) -> str:
        bias = f"{stem}_bias"
        product = f"{stem}.product" if bias in self.tensors else output
        self.add("FusedMatMul", [x, self.widened(f"{stem}.weight")], product, transB=1)
        return self.add("Add", [product, bias], output, "") if bias in self.tensors else product

    def scales(self, stem: str) -> str:
        """The matrix's scales in fp32, which the operators want."""
        return self.widened(f"{stem}.scales")

    def widened(self, name: str) -> str:
        """A tensor in fp32; ONNX Runtime casts it as it loads."""
        return self.add("Cast", [name], f"{name}_fp32", "", to=TensorProto.FLOAT)


def build_graph(
    shape: ModelShape,
    constants: Constants,
    tensors: Mapping[str, TensorRef],
    *,
    logits: Logits = "last",
    accuracy_level: int = INT8_ACTIVATIONS,
    fine_inputs: Collection[str] = (),
) -> onnx.ModelProto:
    """The graph over ``tensors`` (roles as ``Export.tensors`` names them), weights external.

    ``logits="last"`` computes the head for the last position only, [batch, 1, vocabulary];
    ``"all"`` for every position. ``accuracy_level`` is MatMulNBits's: 4 quantizes activations to
    INT8 on the fly, 1 keeps them in fp32. The matrices named in ``fine_inputs`` (``layers.2.down``,
    ``head``) read theirs in two INT8 passes, which together lose 254 times less.
    """
    graph = _Graph(shape, constants, tensors, accuracy_level, fine_inputs)
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("layers.")), default=-1)
    _add_lengths(graph)
    _add_rotations(graph)
    residual = _add_embedding(graph)
    branch: str | None = None
    for layer in range(depth):
        last = layer == depth - 1 and logits == "last"
        residual, branch = _add_layer(graph, layer, residual, branch, last)
    normed, _ = _add_norm(graph, "norm", residual, branch, "final")
    graph.matmul(normed, "head", "logits", shape.hidden_size)
    return _finish(graph, depth, logits)


def _add_lengths(graph: _Graph) -> None:
    """Lengths for attention from the mask, int32: past plus new tokens - 1 a row, and their maximum."""
    axis, one = graph.constant("axis_1", [1]), graph.constant("one", [1])
    total = graph.add("ReduceSum", ["attention_mask", axis], "lengths", "", keepdims=0)
    less = graph.add("Sub", [total, one], "lengths_minus_1", "")
    graph.add("Cast", [less], "seqlens_k", "", to=TensorProto.INT32)
    width = graph.add("Shape", ["attention_mask"], "mask_width", "", start=1, end=2)
    narrow = graph.add("Cast", [width], "mask_width_int32", "", to=TensorProto.INT32)
    graph.add("Squeeze", [narrow], "total_length", "")


def _add_rotations(graph: _Graph) -> None:
    """Cosines and sines, fp32 [context length, head_dim / 2]; ONNX Runtime computes them as it loads."""
    bounds = {"first": 0.0, "end": float(graph.constants.context_length), "step": 1.0}
    limits = [graph.scalar(f"position_{name}", value) for name, value in bounds.items()]
    positions = graph.add("Range", limits, "positions", "")
    column = graph.add("Unsqueeze", [positions, graph.constant("column", [1])], "position_column", "")
    angles = graph.add("Mul", [column, "inverse_frequencies"], "angles", "")
    scale = graph.scalar("rope_scale", graph.constants.rope_scale)
    for name, op in (("cos", "Cos"), ("sin", "Sin")):
        graph.add("Mul", [graph.add(op, [angles], f"{name}_unscaled", ""), scale], name, "")


def _add_embedding(graph: _Graph) -> str:
    if "embed.scales" not in graph.tensors:
        return graph.add("Gather", [graph.widened("embed.weight"), "input_ids"], "embedded", "", axis=0)
    bits = graph.tensors["embed.weight"].dims[1] * 8 // graph.shape.hidden_size
    zeros = ["embed.zeros"] if "embed.zeros" in graph.tensors else []
    return graph.add(
        "GatherBlockQuantized",
        ["embed.weight", "input_ids", graph.scales("embed"), *zeros],
        "embedded",
        bits=bits,
        block_size=QUANT_BLOCK[bits],
        gather_axis=0,
        quantize_axis=1,
    )


def _add_layer(graph: _Graph, layer: int, residual: str, branch: str | None, last: bool) -> tuple[str, str]:
    """One decoder layer; returns the residual stream and the MLP's output still to be added to it.

    ``last``: the positions before the last one are only needed as keys and values.
    """
    stem = f"layers.{layer}"
    shape = graph.shape
    normed, residual = _add_norm(graph, f"{stem}.input_norm", residual, branch, f"{stem}.attention")
    attended = _add_attention(graph, stem, normed, layer)
    if last:
        attended, residual = (_add_last_position(graph, name) for name in (attended, residual))
    branch = graph.matmul(attended, f"{stem}.o", f"{stem}.attention_out", shape.q_size)
    normed, residual = _add_norm(graph, f"{stem}.post_norm", residual, branch, f"{stem}.mlp")
    gate = graph.matmul(normed, f"{stem}.gate", f"{stem}.gate_out", shape.hidden_size)
    up = graph.matmul(normed, f"{stem}.up", f"{stem}.up_out", shape.hidden_size)
    activated = graph.add("QuickGelu", [gate], f"{stem}.silu", alpha=1.0)
    product = graph.add("Mul", [activated, up], f"{stem}.product", "")
    width = graph.tensors[f"{stem}.gate.weight"].dims[0]
    return residual, graph.matmul(product, f"{stem}.down", f"{stem}.mlp_out", width)


def _add_norm(graph: _Graph, weight: str, residual: str, branch: str | None, stem: str) -> tuple[str, str]:
    """RMSNorm of residual + branch; returns the normed value and the sum."""
    epsilon = graph.constants.norm_epsilon
    normed = f"{stem}.normed"
    if branch is None:
        graph.add(
            "SimplifiedLayerNormalization",
            [residual, weight],
            normed,
            "",
            axis=-1,
            epsilon=epsilon,
            stash_type=1,
        )
        return normed, residual
    total = f"{stem}.residual"
    graph.nodes.append(
        helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [residual, branch, weight],
            [normed, "", "", total],
            normed,
            domain=MS,
            epsilon=epsilon,
        )
    )
    return normed, total


def _add_attention(graph: _Graph, stem: str, normed: str, layer: int) -> str:
    shape = graph.shape
    packed = graph.matmul(normed, f"{stem}.qkv", f"{stem}.qkv_out", shape.hidden_size)
    query = [packed, "", ""]
    if shape.qk_norm:
        query = _add_head_norms(graph, stem, packed)
    output = f"{stem}.attended"
    graph.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            [
                *query,
                f"past_key_values.{layer}.key",
                f"past_key_values.{layer}.value",
                "seqlens_k",
                "total_length",
                "cos",
                "sin",
            ],
            [output, f"present.{layer}.key", f"present.{layer}.value"],
            output,
            domain=MS,
            num_heads=shape.num_heads,
            kv_num_heads=shape.num_kv_heads,
            scale=shape.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=graph.constants.local_window,
        )
    )
    return output


def _add_head_norms(graph: _Graph, stem: str, packed: str) -> list[str]:
    """Qwen3's RMSNorm of every query and key head before rotation."""
    shape = graph.shape
    parts = [f"{stem}.{part}" for part in ("q", "k", "v")]
    sizes = graph.constant(f"{stem}.sizes", [shape.q_size, shape.kv_size, shape.kv_size])
    graph.nodes.append(helper.make_node("Split", [packed, sizes], parts, f"{stem}.split", axis=-1))
    heads = graph.constant(f"{stem}.by_head", [0, 0, -1, shape.head_dim])
    flat = graph.constant(f"{stem}.flat", [0, 0, -1])
    for index, part in enumerate(parts[:2]):
        split = graph.add("Reshape", [part, heads], f"{part}.heads", "")
        normed, _ = _add_norm(graph, f"{part}_norm", split, None, part)
        parts[index] = graph.add("Reshape", [normed, flat], f"{part}.flat", "")
    return parts


def _add_last_position(graph: _Graph, name: str) -> str:
    if not any(tensor.name == LAST_START for tensor in graph.small):
        graph.constant(LAST_START, [-1])
        graph.constant("last_end", [2**62])
        graph.constant("last_axis", [1])
    return graph.add("Slice", [name, LAST_START, "last_end", "last_axis"], f"{name}.last", "")


def _finish(graph: _Graph, depth: int, logits: Logits) -> onnx.ModelProto:
    shape = graph.shape
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        *_cache_infos(shape, depth, "past_key_values", "past"),
    ]
    if logits == "last":  # an input with a default: the server feeds -length to score a whole prompt
        inputs.append(helper.make_tensor_value_info(LAST_START, TensorProto.INT64, [1]))
    rows = 1 if logits == "last" else "length"
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", rows, shape.vocab_size]),
        *_cache_infos(shape, depth, "present", "total"),
    ]
    used = {name for node in graph.nodes for name in node.input}
    weights = [_external(name, ref) for name, ref in graph.tensors.items() if name in used]
    proto = helper.make_graph(graph.nodes, "decoder", inputs, outputs, [*weights, *graph.small])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, MS_OPSET)]
    return helper.make_model(
        proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edge-compressor"
    )


def _cache_infos(shape: ModelShape, depth: int, stem: str, length: str) -> list[onnx.ValueInfoProto]:
    dims = ["batch", shape.num_kv_heads, length, shape.head_dim]
    return [
        helper.make_tensor_value_info(f"{stem}.{layer}.{kind}", TensorProto.FLOAT, dims)
        for layer in range(depth)
        for kind in ("key", "value")
    ]


def _external(name: str, ref: TensorRef) -> onnx.TensorProto:
    tensor = TensorProto(
        name=name, dims=ref.dims, data_type=_ONNX_TYPES[ref.dtype], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", ref.file), ("offset", ref.offset), ("length", ref.bytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
