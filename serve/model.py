"""The package's graph in ONNX Runtime: prefill of one row, one decoding step of many.

GroupQueryAttention is told each row's length and writes new keys and values in place, so that past and
present are the same memory and rows of different lengths share a step. On CPU it takes several new
tokens onto a past for one row at a time only; hence two calls. The graph may be in several parts
(graph.py), between which a prefill can pause.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from compressor.errors import InputError, PackageError
from compressor.huge_pages import on_huge_pages
from compressor.int8_cache import CacheScales, keep_in_int8
from serve.graph import IDS, LAST_START, LOGITS, SplitGraph, split
from serve.kvcache import CacheShape, KeyValueCache

CPU = "CPUExecutionProvider"
SAME_AS_REQUESTED = 1  # an arena's growth; the default doubles it
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),
}

LAYERS_EACH = 2  # of a part: more parts cost no time, but a session each

Logits = npt.NDArray[np.float32]
_Bind = Callable[..., None]


@dataclass(frozen=True)
class Engine:
    """A loaded graph: a session for each of its parts."""

    graph: SplitGraph
    sessions: tuple[ort.InferenceSession, ...]

    def cache_shape(self, heads: int, head_dim: int, capacity: int) -> CacheShape:
        """The cache that the graph asks for. Raises ``PackageError`` if it can't be had."""
        layers = sum(len(part.cache) for part in self.graph.parts) // 2
        past = self.graph.parts[0].cache[0][0]
        dtype = next(entry.type for entry in self.sessions[0].get_inputs() if entry.name == past)
        if dtype not in _DTYPES:
            raise PackageError("the graph's cache is none of fp32, fp16 and INT8: make the package again")
        return CacheShape(layers, heads, head_dim, _DTYPES[dtype], capacity)


@dataclass
class Chunk:
    """A piece of a prompt on its way through the parts; every position's logits are wanted, or the last's."""

    ids: Sequence[int]
    every: bool = False
    part: int = 0
    hidden: dict[str, ort.OrtValue] = field(default_factory=dict)


class Model:
    """A loaded graph with its cache."""

    def __init__(self, engine: Engine, cache: KeyValueCache) -> None:
        self.cache = cache
        self.parts = len(engine.sessions)
        self._engine = engine
        output = next(entry for entry in engine.sessions[-1].get_outputs() if entry.name == LOGITS)
        self.vocabulary = int(output.shape[-1])
        self._last_only = output.shape[1] == 1
        self._start_can_be_set = LAST_START in engine.graph.parts[-1].inputs
        self._buffers: dict[str, npt.NDArray[np.generic]] = {}  # of a decoding step, for every row
        self._decoders: dict[tuple[int, int], _Rows] = {}
        self._warm_up()

    @property
    def scores_chunks(self) -> bool:
        """Whether ``score`` can give the logits of every position, or of the last alone."""
        return self._start_can_be_set or not self._last_only

    def prefill(self, row: int, ids: Sequence[int]) -> Logits:
        """Append ``ids`` to a row; logits [len(ids) or 1, vocabulary], the last for the next token."""
        return self._whole(row, Chunk(ids))

    def score(self, row: int, ids: Sequence[int]) -> Logits:
        """As ``prefill``, but with the logits of every position if the graph ``scores_chunks``."""
        return self._whole(row, Chunk(ids, every=True))

    def advance(self, row: int, chunk: Chunk) -> Logits | None:
        """Put a chunk through its next part; after the last the row has its tokens, and logits are given.

        Until then the row's ``pending`` positions are the chunk's; the row may be swapped, not extended.
        """
        entry = self.cache.rows[row]
        rows = _Rows(self._engine, self.cache, row, 1)
        rows.set_lengths([len(entry.tokens) + len(chunk.ids)])
        entry.pending = len(chunk.ids)
        entry.touched = max(entry.touched, entry.filled)
        rows.run_part(chunk)
        chunk.part += 1
        if chunk.part < self.parts:
            return None
        self._extend(row, chunk.ids)
        return np.asarray(chunk.hidden[LOGITS].numpy()[0], np.float32)

    def decode(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """Append one token to each of the rows from ``first`` on; logits [len(tokens), vocabulary] until
        the next."""
        place = (first, len(tokens))
        if place not in self._decoders:
            self._decoders[place] = _Rows(self._engine, self.cache, *place)
            self._decoders[place].fix_step(self._buffers)
        rows = self._decoders[place]
        rows.set_lengths([len(row.tokens) + 1 for row in self.cache.rows[first : first + len(tokens)]])
        logits = rows.step(tokens)
        for row, token in enumerate(tokens, first):
            self._extend(row, (token,))
        return logits

    def _whole(self, row: int, chunk: Chunk) -> Logits:
        while (logits := self.advance(row, chunk)) is None:
            pass
        return logits

    def _warm_up(self) -> None:
        """Run once, so that the first request doesn't pay for allocations; learns what parts hand over."""
        chunk = Chunk([0] * min(8, self.cache.shape.capacity - 1))
        seen: dict[str, ort.OrtValue] = {}
        while self.advance(0, chunk) is None:
            seen |= chunk.hidden
        seen |= chunk.hidden
        rows = len(self.cache.rows)
        self._buffers[IDS] = np.zeros((rows, 1), np.int64)
        for name, value in seen.items():
            self._buffers[name] = np.zeros((rows, 1, value.shape()[-1]), _DTYPES[value.data_type()])
        self.decode([0])
        self.cache.drop(0)

    def _extend(self, row: int, ids: Sequence[int]) -> None:
        entry = self.cache.rows[row]
        entry.pending = 0
        entry.tokens.extend(ids)
        entry.touched = max(entry.touched, len(entry.tokens))


class _Rows:
    """``batch`` rows of the cache from ``first`` on, to be bound to every part as both past and present."""

    def __init__(self, engine: Engine, cache: KeyValueCache, first: int, batch: int) -> None:
        self._engine = engine  # what is bound by address must live as long as this
        self._cache = cache
        self._place = slice(first, first + batch)
        self._total = np.zeros(1, np.int32)
        self._lengths = np.zeros(batch, np.int32)
        self._start = np.full(1, -1, np.int64)
        self._step: dict[str, npt.NDArray[np.generic]] = {}
        self._bindings: list[ort.IOBinding] = []

    def _bound(self, index: int) -> ort.IOBinding:
        """A binding of a part to the cache, to the rows' lengths and to what all parts share."""
        graph, part = self._engine.graph, self._engine.graph.parts[index]
        binding = self._engine.sessions[index].io_binding()
        before = sum(len(earlier.cache) for earlier in graph.parts[:index])
        tensors = self._cache.tensors[before : before + len(part.cache)]
        for (past, present), tensor in zip(part.cache, tensors, strict=True):
            _bind(binding.bind_input, past, tensor[self._place])
            _bind(binding.bind_output, present, tensor[self._place])
        lengths = {graph.lengths: self._lengths, graph.total: self._total, LAST_START: self._start}
        for name, values in {**lengths, **graph.shared}.items():
            if name in part.inputs:
                _bind(binding.bind_input, name, values)
        return binding

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Of the rows, the new tokens included."""
        self._lengths[:] = lengths
        self._lengths -= 1  # GroupQueryAttention wants the last position
        self._total[0] = max(lengths)

    def run_part(self, chunk: Chunk) -> None:
        """The next part of a chunk of the one row; what it gives is added to the chunk's hidden values."""
        part, binding = self._engine.graph.parts[chunk.part], self._bound(chunk.part)
        self._start[0] = -len(chunk.ids) if chunk.every else -1
        if IDS in part.inputs:
            binding.bind_cpu_input(IDS, np.asarray([chunk.ids], np.int64))
        for name in part.takes:
            binding.bind_ortvalue_input(name, chunk.hidden[name])
        for name in part.gives:
            binding.bind_output(name, "cpu")
        self._engine.sessions[chunk.part].run_with_iobinding(binding)
        values = binding.get_outputs()[len(part.cache) :]
        chunk.hidden |= zip(part.gives, values, strict=True)
        for name in part.drops:
            del chunk.hidden[name]

    def fix_step(self, buffers: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Bind everything of a decoding step, so that a step only runs."""
        batch = len(self._lengths)
        self._step = {name: values[:batch] for name, values in buffers.items()}
        for index, part in enumerate(self._engine.graph.parts):
            binding = self._bound(index)
            for name in {*part.takes, *part.inputs} & set(self._step):
                _bind(binding.bind_input, name, self._step[name])
            for name in part.gives:
                _bind(binding.bind_output, name, self._step[name])
            self._bindings.append(binding)

    def step(self, tokens: Sequence[int]) -> Logits:
        """Run a decoding step; logits [batch, vocabulary], valid until the next."""
        self._step[IDS][:, 0] = tokens
        for session, binding in zip(self._engine.sessions, self._bindings, strict=True):
            session.run_with_iobinding(binding)
        return np.asarray(self._step[LOGITS][:, 0], np.float32)


def _bind(bind: _Bind, name: str, values: npt.NDArray[np.generic]) -> None:
    bind(name, "cpu", 0, values.dtype.type, list(values.shape), values.ctypes.data)


def share_resources(threads: int) -> None:
    """Let all sessions of this process use the same threads and memory; to be called before the first.

    Threads of a session's own would keep spinning after its part while the next part's need the cores,
    and memory of its own would be kept for the next chunk.
    """
    ort.set_default_logger_severity(3)
    ort.set_global_thread_pool_sizes(threads, 1)
    kind = (ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    growth = ort.OrtArenaCfg({"max_mem": 0, "arena_extend_strategy": SAME_AS_REQUESTED})
    ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", *kind), growth)


def open_engine(
    path: Path,
    threads: int,
    layers_each: int | None = None,
    shared: bool = False,
    scales: CacheScales | None = None,
) -> Engine:
    """Load a package's graph, in parts of ``layers_each`` layers or whole.

    ``shared`` after ``share_resources``; ``scales`` for keys and values in INT8. Raises ``PackageError``
    where ONNX Runtime cannot load it.
    """
    options = ort.SessionOptions()
    if shared:
        options.use_per_session_threads = False
        options.add_session_config_entry("session.use_env_allocators", "1")
    else:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # planned patterns waste a fifth where layers' widths differ
    options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
    try:
        graph = split(path, layers_each, options)
        models = [part.model if scales is None else _in_int8(part.model, scales) for part in graph.parts]
        with on_huge_pages():
            sessions = tuple(ort.InferenceSession(model, options, providers=[CPU]) for model in models)
    except (PackageError, InputError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise PackageError(f"{path}: ONNX Runtime {ort.__version__} cannot load it ({reason})") from None
    return Engine(graph, sessions)


def _in_int8(model: bytes, scales: CacheScales) -> bytes:
    part: bytes = keep_in_int8(onnx.load_from_string(model), scales).SerializeToString()
    return part
