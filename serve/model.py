"""The package's graph in ONNX Runtime: prefill of one row, one decoding step of many.

GroupQueryAttention reads each row's length from the attention mask and writes new keys and values in
place, so that past and present are the same memory and rows of different lengths share a step. On CPU
it takes several new tokens onto a past for one row at a time only; hence two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from compressor.errors import PackageError
from serve.kvcache import CacheShape, KeyValueCache

LAST_START = "last_start"  # of the positions whose logits the graph gives; by default -1, the last
CPU = "CPUExecutionProvider"
_DTYPES = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}

Logits = npt.NDArray[np.float32]


class Model:
    """A loaded graph with its cache."""

    def __init__(self, session: ort.InferenceSession, cache: KeyValueCache) -> None:
        self.cache = cache
        self._session = session
        output = session.get_outputs()[0]
        self.vocabulary = int(output.shape[-1])
        self._last_only = output.shape[1] == 1
        self._start_can_be_set = any(
            entry.name == LAST_START for entry in session.get_overridable_initializers()
        )
        self._logits_dtype = _DTYPES[output.type]
        self._decoders: dict[int, _Step] = {}
        self._prefillers: dict[int, ort.IOBinding] = {}

    @property
    def scores_chunks(self) -> bool:
        """Whether ``score`` can give the logits of every position, or of the last alone."""
        return self._start_can_be_set or not self._last_only

    def prefill(self, row: int, ids: Sequence[int]) -> Logits:
        """Append ``ids`` to a row; logits [len(ids) or 1, vocabulary], the last for the next token."""
        if row not in self._prefillers:
            self._prefillers[row] = self._bind(row, 1)
        binding = self._prefillers[row]
        for name, value in self._inputs(row, ids).items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        self._extend(row, ids)
        return np.asarray(binding.get_outputs()[-1].numpy()[0], np.float32)

    def score(self, row: int, ids: Sequence[int]) -> Logits:
        """As ``prefill``, but with the logits of every position if the graph ``scores_chunks``."""
        if not self._start_can_be_set:
            return self.prefill(row, ids)
        done = len(self.cache.rows[row].tokens)
        feed = {
            name: self.cache.tensors[index][row : row + 1, :, :done]
            for index, name in self._names("past_key_values")
        }
        feed |= self._inputs(row, ids) | {LAST_START: np.asarray([-len(ids)], np.int64)}
        outputs = [name for _, name in self._names("present")]
        logits, *present = self._session.run(["logits", *outputs], feed)  # a binding can't set an initializer
        for tensor, new in zip(self.cache.tensors, present, strict=True):
            tensor[row, :, done : done + len(ids)] = new[0, :, done:]
        self._extend(row, ids)
        return np.asarray(logits[0], np.float32)

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each of the first rows; logits [len(tokens), vocabulary] until the next."""
        batch = len(tokens)
        if batch not in self._decoders:
            self._decoders[batch] = _Step(self._bind(0, batch), batch, self.vocabulary, self._logits_dtype)
        step = self._decoders[batch]
        lengths = np.fromiter((len(row.tokens) + 1 for row in self.cache.rows[:batch]), np.int64, batch)
        mask = np.arange(int(lengths.max())) < lengths[:, None]
        step.binding.bind_cpu_input("input_ids", np.asarray(tokens, np.int64)[:, None])
        step.binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask, np.int64))
        self._session.run_with_iobinding(step.binding)
        for row, token in enumerate(tokens):
            self._extend(row, (token,))
        return np.asarray(step.logits[:, 0], np.float32)

    def warm_up(self) -> None:
        """Run once, so that the first request doesn't pay for allocations."""
        self.prefill(0, [0] * min(8, self.cache.shape.capacity - 1))
        self.decode([0])
        self.cache.drop(0)

    def _extend(self, row: int, ids: Sequence[int]) -> None:
        entry = self.cache.rows[row]
        entry.tokens.extend(ids)
        entry.touched = max(entry.touched, len(entry.tokens))

    def _inputs(self, row: int, ids: Sequence[int]) -> dict[str, npt.NDArray[np.int64]]:
        total = len(self.cache.rows[row].tokens) + len(ids)
        return {"input_ids": np.asarray([ids], np.int64), "attention_mask": np.ones((1, total), np.int64)}

    def _names(self, stem: str) -> list[tuple[int, str]]:
        """Index in the cache's tensors, and name in the graph, of each layer's keys and values."""
        count = len(self.cache.tensors)
        return [(index, f"{stem}.{index // 2}.{'value' if index % 2 else 'key'}") for index in range(count)]

    def _bind(self, first: int, batch: int) -> ort.IOBinding:
        """A binding to ``batch`` rows from ``first`` on, as both past and present."""
        binding = self._session.io_binding()
        names = zip(self._names("past_key_values"), self._names("present"), strict=True)
        for (index, past), (_, present) in names:
            rows = self.cache.tensors[index][first : first + batch]
            place = ("cpu", 0, rows.dtype.type, list(rows.shape), rows.ctypes.data)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)
        return binding


class _Step:
    """The binding of a decoding step of a fixed number of rows, with its logits."""

    def __init__(
        self, binding: ort.IOBinding, batch: int, vocabulary: int, dtype: np.dtype[np.generic]
    ) -> None:
        self.binding = binding
        self.logits = np.empty((batch, 1, vocabulary), dtype)
        binding.bind_output("logits", "cpu", 0, dtype.type, list(self.logits.shape), self.logits.ctypes.data)


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """Load a package's graph. Raises ``PackageError`` where ONNX Runtime cannot."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # planned patterns waste a fifth where layers' widths differ
    try:
        return ort.InferenceSession(str(path), options, providers=[CPU])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise PackageError(f"{path}: ONNX Runtime {ort.__version__} cannot load it ({reason})") from None


def cache_shape(session: ort.InferenceSession, heads: int, head_dim: int, capacity: int) -> CacheShape:
    """The cache that a graph's inputs ask for. Raises ``PackageError`` if it has none."""
    keys = [entry for entry in session.get_inputs() if entry.name.endswith(".key")]
    if not keys or keys[0].type not in _DTYPES:
        raise PackageError("the graph has no key-value cache in fp32 or fp16: make the package again")
    return CacheShape(len(keys), heads, head_dim, _DTYPES[keys[0].type], capacity)
