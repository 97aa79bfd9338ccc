"""A package's graph in parts of a few layers each, so that a chunk of a prompt can pause between them.

The parts share the weights' file and are run one after the other; together they compute what the whole
graph does, to the last bit. Lengths of rows become inputs of every part, where the whole graph derives
them from an attention mask; what depends on no input (the rotary tables) is computed once for all parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, helper

from compressor.errors import PackageError

ATTENTION = "GroupQueryAttention"
LAST_START = "last_start"  # of the positions whose logits the graph gives
IDS = "input_ids"
LOGITS = "logits"
PAST, LENGTHS, TOTAL = slice(3, 5), 5, 6  # places among attention's inputs
PRESENT = slice(1, 3)  # and among its outputs


@dataclass(frozen=True)
class Part:
    """Consecutive layers as a graph of their own.

    ``takes`` and ``gives`` name what passes from part to part (and the logits, at last), ``drops`` what no
    later part takes; ``cache`` the inputs and outputs of each layer's keys and values, layer by layer.
    """

    model: bytes
    inputs: tuple[str, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    drops: tuple[str, ...]
    cache: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SplitGraph:
    """A graph's parts, the values that all of them share, and the names of the inputs that say lengths."""

    parts: tuple[Part, ...]
    shared: Mapping[str, npt.NDArray[np.generic]]
    lengths: str
    total: str


def split(path: Path, layers_each: int | None, options: ort.SessionOptions) -> SplitGraph:
    """Split a graph into parts of about ``layers_each`` layers, or keep it in one.

    ``options`` are for computing what the parts share. Raises ``PackageError`` if the graph isn't a
    decoder with a key-value cache in GroupQueryAttention.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise PackageError(f"{path} is damaged ({str(error).splitlines()[0]}): copy it again") from None
    attentions = [node for node in model.graph.node if node.op_type == ATTENTION]
    lengths = {(node.input[LENGTHS], node.input[TOTAL]) for node in attentions if len(node.input) > TOTAL}
    if len(lengths) != 1 or not all(all(node.input[PAST]) for node in attentions):
        raise PackageError(f"{path}: the graph has no key-value cache that can be served: package it again")
    return _Splitter(model, attentions, *lengths.pop()).split(layers_each, options)


class _Splitter:
    """What is known of a graph while it is being split."""

    def __init__(self, model: ModelProto, attentions: Sequence[NodeProto], lengths: str, total: str) -> None:
        self.model = model
        self.graph: GraphProto = model.graph
        self.attentions = attentions
        self.lengths, self.total = lengths, total
        self.makers = {name: node for node in self.graph.node for name in node.output if name}
        self.initializers = {entry.name: entry for entry in self.graph.initializer}
        self.inputs = {entry.name: entry for entry in self.graph.input}
        self.nodes = self._needed()
        self.depth = self._depths()
        self.fixed = self._fixed()

    def split(self, layers_each: int | None, options: ort.SessionOptions) -> SplitGraph:
        layers = len(self.attentions)
        count = math.ceil(layers / (layers_each or layers))
        ends = [round(layers * (index + 1) / count) for index in range(count)]
        groups = self._groups(ends)
        users = self._users(groups)
        shared = {name for name, parts in users.items() if len(parts) > 1 and self._is_fixed(name)}
        parts = tuple(self._part(group, index, users, shared) for index, group in enumerate(groups))
        return SplitGraph(parts, self._values(shared, options), self.lengths, self.total)

    def _needed(self) -> list[NodeProto]:
        """The nodes that outputs depend on, once lengths are inputs; in the graph's order."""
        wanted = [entry.name for entry in self.graph.output]
        found: set[str] = set()
        while wanted:
            name = wanted.pop()
            node = self.makers.get(name)
            if node is not None and name not in (self.lengths, self.total) and node.output[0] not in found:
                found.add(node.output[0])
                wanted.extend(node.input)
        return [node for node in self.graph.node if node.output[0] in found]

    def _depths(self) -> dict[str, int]:
        """How many attentions each value has behind it."""
        depth: dict[str, int] = {}
        for node in self.nodes:
            behind = max((depth.get(name, 0) for name in node.input), default=0)
            for name in node.output:
                depth[name] = behind + (node.op_type == ATTENTION)
        return depth

    def _fixed(self) -> set[str]:
        """Values that depend on no input."""
        fixed = set(self.initializers) - {LAST_START}
        for node in self.nodes:
            if all(name in fixed for name in node.input if name):
                fixed.update(node.output)
        return fixed

    def _is_fixed(self, name: str) -> bool:
        return name in self.fixed and name not in self.initializers

    def _groups(self, ends: Sequence[int]) -> list[list[NodeProto]]:
        """The nodes of each part, but for those whose values are fixed."""
        groups: list[list[NodeProto]] = [[] for _ in ends]
        for node in self.nodes:
            if node.output[0] not in self.fixed:
                part = next(index for index, end in enumerate(ends) if self.depth[node.output[0]] <= end)
                groups[part].append(node)
        return groups

    def _users(self, groups: Sequence[Sequence[NodeProto]]) -> dict[str, set[int]]:
        """Which parts' nodes take each value."""
        users: dict[str, set[int]] = {}
        for index, group in enumerate(groups):
            for name in (name for node in group for name in node.input if name):
                users.setdefault(name, set()).add(index)
        return users

    def _part(
        self, group: Sequence[NodeProto], index: int, users: Mapping[str, set[int]], shared: set[str]
    ) -> Part:
        nodes = self._with_fixed(group, shared)
        made = {name for node in nodes for name in node.output}
        needed = list(dict.fromkeys(name for node in nodes for name in node.input if name))
        outside = [name for name in needed if name not in made and not self._is_constant(name)]
        takes = [name for name in outside if self._is_passed(name, shared)]
        gives = [name for name in made if name == LOGITS or max(users.get(name, {index})) > index]
        drops = [name for name in takes if max(users[name]) == index]
        layers = [node for node in group if node.op_type == ATTENTION]
        cache = [pair for node in layers for pair in zip(node.input[PAST], node.output[PRESENT], strict=True)]
        own = {entry.name: entry for entry in self.graph.output}
        presents = [present for _, present in cache]
        outputs = [own.get(name) or self._hidden(name) for name in (*presents, *gives)]
        graph = helper.make_graph(
            nodes,
            f"part {index}",
            [self._declared(name) for name in outside],
            outputs,
            [self.initializers[name] for name in needed if self._is_constant(name)],
        )
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )
        names = tuple(name for name in outside if name not in takes)
        passed = (tuple(takes), tuple(gives), tuple(drops))
        return Part(model.SerializeToString(), names, *passed, tuple(cache))

    def _with_fixed(self, group: Sequence[NodeProto], shared: set[str]) -> list[NodeProto]:
        """The nodes with those of fixed values that only they need, in the graph's order."""
        wanted = [name for node in group for name in node.input]
        found = {node.output[0] for node in group}
        while wanted:
            name = wanted.pop()
            if name in self.makers and self._is_fixed(name) and name not in shared:
                node = self.makers[name]
                if node.output[0] not in found:
                    found.add(node.output[0])
                    wanted.extend(node.input)
        return [node for node in self.nodes if node.output[0] in found]

    def _is_constant(self, name: str) -> bool:
        return name in self.initializers and name != LAST_START

    def _is_passed(self, name: str, shared: set[str]) -> bool:
        """Whether a value comes from an earlier part."""
        return name in self.depth and name not in shared and name not in (self.lengths, self.total)

    def _declared(self, name: str) -> onnx.ValueInfoProto:
        if name in (self.lengths, self.total):
            return helper.make_tensor_value_info(name, onnx.TensorProto.INT32, None)
        return self.inputs[name] if name in self.inputs else self._hidden(name)

    def _hidden(self, name: str) -> onnx.ValueInfoProto:
        """What passes between layers, and the rotary tables, have the cache's type."""
        past = self.inputs[self.attentions[0].input[PAST][0]]
        return helper.make_tensor_value_info(name, past.type.tensor_type.elem_type, None)

    def _values(
        self, names: Iterable[str], options: ort.SessionOptions
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Compute fixed values."""
        wanted = sorted(names)
        if not wanted:
            return {}
        nodes = self._with_fixed([self.makers[name] for name in wanted], set())
        constants = {name for node in nodes for name in node.input if name in self.initializers}
        graph = helper.make_graph(
            nodes,
            "shared",
            [],
            [self._hidden(name) for name in wanted],
            [self.initializers[name] for name in sorted(constants)],
        )
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(wanted, session.run(wanted, {}), strict=True))
