"""An ONNX Runtime session over a candidate's graph, and the decoding loop that serving runs.

Keys and values live in buffers of full length, allocated once and bound as both past and present,
so that a step copies no cache; between steps only the token ids and the mask change.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from compressor.errors import UnfitMachineError
from compressor.huge_pages import on_huge_pages
from compressor.space import ModelShape

CPU = "CPUExecutionProvider"
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_REST_AFTER_RUNS = "session.force_spinning_stop"
_CACHE_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def open_session(
    graph: onnx.ModelProto,
    weights: Path,
    threads: int | None = None,
    *,
    provider: str = CPU,
    profile_to: Path | None = None,
) -> ort.InferenceSession:
    """Load a graph whose external weights lie in folder ``weights``.

    ``threads``: of one operator; default, the cores this process may use. ``provider``: the execution
    provider asked for; nodes that it lacks run on the CPU, see ``node_placement``. ``profile_to`` is
    the prefix of ONNX Runtime's profile, written at ``session.end_profiling()``.
    Raises ``UnfitMachineError`` where ONNX Runtime cannot.
    """
    if provider not in ort.get_available_providers():
        raise UnfitMachineError(
            f"ONNX Runtime {ort.__version__} here has no {provider}, only "
            f"{', '.join(ort.get_available_providers())}: install the build of onnxruntime that has it"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Planned memory patterns leave holes between layers of different widths: a fifth more at the peak.
    options.enable_mem_pattern = False
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights.resolve()))
    # Else its threads look for more work for 0.1 s after a run, and what runs next takes twice as long.
    options.add_session_config_entry(_REST_AFTER_RUNS, "1")
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    try:
        with on_huge_pages():
            return ort.InferenceSession(
                graph.SerializeToString(), options, providers=list(dict.fromkeys((provider, CPU)))
            )
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UnfitMachineError(
            f"ONNX Runtime {ort.__version__} cannot load the sub-network ({first}): free memory, or "
            "reinstall the engine with `pip install -e '.[onnx]'` in the clone"
        ) from None


def node_placement(
    graph: onnx.ModelProto, weights: Path, shape: ModelShape, *, provider: str = CPU
) -> Counter[tuple[str, str]]:
    """How many nodes of each operator really ran where, from a profiled pass over a few tokens.

    Keys are (execution provider, operator). A provider that lacks an operator leaves it to the CPU
    without a word; this finds it out.
    """
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(graph, weights, provider=provider, profile_to=Path(scratch) / "profile")
        prefill_logits(session, shape, np.ones((1, 4), np.int64))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event["args"] for event in events if event.get("name", "").endswith("_kernel_time")]
    return Counter((str(ran["provider"]), str(ran["op_name"])) for ran in kernels)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Decoder:
    """A batch of equally long sequences being decoded greedily."""

    def __init__(self, session: ort.InferenceSession, shape: ModelShape, batch: int, capacity: int) -> None:
        """Buffers for ``batch`` sequences of up to ``capacity`` tokens each."""
        self._session = session
        self._binding = session.io_binding()
        self._mask = np.ones((batch, capacity), np.int64)
        self._buffers = []
        self.length = 0
        past = [entry for entry in session.get_inputs() if entry.name.endswith(".key")]
        dims = [batch, shape.num_kv_heads, capacity, shape.head_dim]
        for layer, entry in enumerate(past):
            for kind in ("key", "value"):
                buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(dims, _CACHE_DTYPES[entry.type]))
                self._buffers.append(buffer)
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", buffer)
                self._binding.bind_ortvalue_output(f"present.{layer}.{kind}", buffer)
        self._rows_are_all = session.get_outputs()[0].shape[1] != 1
        self._vocabulary = shape.vocab_size
        self._logits: dict[tuple[int, ...], ort.OrtValue] = {}

    @property
    def caches(self) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Each layer's keys and values so far, [batch, kv heads, length, head dim]."""
        held = [buffer.numpy()[:, :, : self.length] for buffer in self._buffers]
        return list(zip(held[::2], held[1::2], strict=True))

    def restart(self) -> None:
        """Forget the sequences; their buffers are reused."""
        self.length = 0

    def step(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Append ``ids`` [batch, length] to the sequences; returns the logits [batch, rows, vocabulary].

        The logits live in a buffer that the next step writes over. More than one token onto sequences that
        have some already needs a batch of one, a limit of GroupQueryAttention on CPU.
        """
        self.length += ids.shape[1]
        mask = np.ascontiguousarray(self._mask[:, : self.length])
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        self._binding.bind_cpu_input("attention_mask", mask)
        output = self._output(ids.shape[0], ids.shape[1] if self._rows_are_all else 1)
        self._binding.bind_ortvalue_output("logits", output)
        self._session.run_with_iobinding(self._binding)
        logits: npt.NDArray[np.float32] = output.numpy()
        return logits

    def _output(self, *dims: int) -> ort.OrtValue:
        """A buffer for logits of this shape, allocated once."""
        if dims not in self._logits:
            buffer = np.empty((*dims, self._vocabulary), np.float32)
            self._logits[dims] = ort.OrtValue.ortvalue_from_numpy(buffer)
        return self._logits[dims]

    def next_ids(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """The likeliest next token of each sequence, [batch, 1]."""
        return np.asarray(logits[:, -1].argmax(axis=-1)[:, None], np.int64)


def prefill_logits(
    session: ort.InferenceSession, shape: ModelShape, ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Logits of sequences ``ids`` [batch, length] in one pass, [batch, rows, vocabulary]."""
    ids = np.ascontiguousarray(ids, np.int64)
    empty = np.zeros((ids.shape[0], shape.num_kv_heads, 0, shape.head_dim), np.float32)
    feed: dict[str, Any] = {
        entry.name: empty for entry in session.get_inputs() if entry.name.startswith("past_key_values")
    }
    feed |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (logits,) = session.run(["logits"], feed)
    return np.asarray(logits, np.float32)
