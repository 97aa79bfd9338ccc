"""The units of the measuring benchmark: each one takes a few figures on the starter and returns them.

Everything they work on is made once and kept: the starter as a ranked, untuned super-network, its export
in 8 and 4 bits, and the starter as llama.cpp's Q8_0 file.
"""

from __future__ import annotations

import json
import subprocess
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rivals

from compressor.engines.onnx_export import export
from compressor.engines.onnx_graph import FP32_ACTIVATIONS, build_graph
from compressor.engines.onnx_session import open_session, prefill_logits
from compressor.engines.onnx_verify import mean_kl
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.paired import FINAL_PRECISION
from compressor.engines.speed import panel
from compressor.measurement import Measurement
from compressor.profile import Workload
from compressor.space import SearchSpace, SubNetwork, flops_per_token

Figures = dict[str, Any]

WORKLOAD = Workload(prompt_tokens=128, output_tokens=32)
LONG = Workload(prompt_tokens=512, output_tokens=32)
PANEL, PANEL_PATIENCE = 24, 1.5
"""Sub-networks whose order by speed is asked for, and so much longer measured: many are within a tenth."""
TOKENS = 500
READ_AT_ONCE = 64
"""Of those tokens, where the others are generated, so to speak, one by one."""
COMPARED = 8
"""Sub-networks of the panel whose logits are compared, beside the largest and the smallest."""

LLAMA = """
import json, sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_threads_batch=2, n_batch=512, verbose=False)
length = int(sys.argv[2])
prompt, prefills, steps = [17 + 37 * i % 40000 for i in range(length)], [], []
for repeat in range(6):
    model.reset()
    began = time.perf_counter(); model.eval(prompt); prefills.append(time.perf_counter() - began)
    for _ in range(31):
        began = time.perf_counter(); model.eval([17]); steps.append(time.perf_counter() - began)
middle = lambda values: 1e3 * sorted(values)[len(values) // 2]
print(json.dumps([middle(prefills[1:]), middle(steps[31:])]))
"""


class Bench:
    """What the units share, made when first asked for."""

    def __init__(self, cache: Path, data: Path, seconds: float) -> None:
        self.cache = cache
        self.data = data
        self.seconds = seconds
        cache.mkdir(parents=True, exist_ok=True)

    @cached_property
    def supernet(self) -> Path:
        """The starter with its neurons ranked and sorted on text that it wrote, untuned."""
        folder = self.cache / "supernet"
        if not (folder / "supernet.json").is_file():
            import torch

            from compressor import models
            from compressor.supernet.folder import save_supernet
            from compressor.supernet.importance import rank, sort_neurons
            from compressor.supernet.sampling import sample_text

            base = rivals.model_folder(self.cache)
            loaded = models.load(models.resolve(str(base)), torch.float32)
            importance = rank(loaded.model, [sample_text(loaded.model, loaded.tokenizer, 16, 128, 0).ids])
            sort_neurons(loaded.model, importance)
            folder.mkdir(exist_ok=True)
            model = loaded.model.to(torch.bfloat16)
            save_supernet(model, loaded.tokenizer, importance.drop_order, importance.ordering, folder)
        return folder

    @cached_property
    def engine(self) -> OnnxRuntimeEngine:
        made = export(self.supernet, self.cache / "export", (8, 4))
        return OnnxRuntimeEngine(made.folder, kv_cache="int8")

    @cached_property
    def space(self) -> SearchSpace:
        order = json.loads((self.supernet / "supernet.json").read_text(encoding="utf-8"))["drop_order"]
        shape = self.engine.export.shape
        return SearchSpace.from_fractions(shape, (0.7, 0.8, 0.9, 1.0), (0.5, 0.75, 1.0), tuple(order))

    @cached_property
    def subnets(self) -> list[SubNetwork]:
        """The panel that the predictor is fitted on, then sub-networks drawn at random."""
        rng = np.random.default_rng(0)
        drawn = (self.space.sample(rng) for _ in range(2 * PANEL))
        return list(dict.fromkeys([*panel(self.space), *drawn]))[:PANEL]

    def building(self) -> Figures:
        """Building and loading a candidate, cuts of all widths made before, as in a run; and the bytes of the
        largest one's graph and cache scales."""
        self.engine.export.prepare(self.space.widths)
        rng = np.random.default_rng(1)
        self.engine.build(self.space.sample(rng))
        seconds = []
        for _ in range(3):
            subnet = self.space.sample(rng)
            began = time.perf_counter()
            self.engine.build(subnet)
            seconds.append(time.perf_counter() - began)
        tensors = self.engine.export.tensors(self.space.full)
        graph = build_graph(self.engine.export.shape, self.engine.export.constants, tensors)
        scales = self.engine.scales
        assert scales is not None
        kept = scales.keys.nbytes + scales.values.nbytes
        return {"seconds": seconds, "bytes": len(graph.SerializeToString()) + kept}

    def repeat(self) -> Figures:
        """One candidate in turns with the reference, as a run measures its winner."""
        candidate, reference = self.engine.build(self.space.smallest), self.engine.build(self.space.full)
        measured = self.engine.bench_against(
            candidate, reference, WORKLOAD, max_seconds=2 * self.seconds, precision=FINAL_PRECISION
        )
        return {"taken_at": time.time(), **_figures(measured)}

    def panel(self) -> Figures:
        """24 sub-networks, each in turns with the reference."""
        reference = self.engine.build(self.space.full)
        taken = []
        for subnet in self.subnets:
            candidate = self.engine.build(subnet)
            measured = self.engine.bench_against(
                candidate, reference, WORKLOAD, max_seconds=PANEL_PATIENCE * self.seconds
            )
            flops = flops_per_token(self.space.shape, subnet)
            taken.append({"subnet": subnet.to_dict(), "flops": flops, **_figures(measured)})
        return {"known": len(panel(self.space)), "taken": taken}

    def logits(self) -> Figures:
        """The engine against PyTorch on the same rounded weights: fp32 activations, then INT8 ones with
        keys and values in INT8, the text read at once and one token after the other."""
        from transformers import AutoTokenizer

        from tests.engines.reference import cut_quantized, logits

        text = (self.data / "wikitext2" / "test.txt").read_text(encoding="utf-8")[:5000]
        tokenizer = AutoTokenizer.from_pretrained(self.supernet)
        ids = np.array([tokenizer(text).input_ids[:TOKENS]], np.int64)
        found = []
        mixed = SubNetwork(self.space.full.layers, self.space.full.widths, (8, 4) * 15)
        chosen = [self.space.full, self.space.smallest, mixed, *self.subnets[-COMPARED:]]
        for subnet in dict.fromkeys(chosen):
            expected = logits(cut_quantized(self.supernet, subnet), ids)[0]
            candidate = self.engine.build(subnet)
            exact, served = self._fp32_logits(subnet, ids), self.engine.logits(candidate, ids[0])
            decoded = self.engine.decoded_logits(candidate, ids[0], READ_AT_ONCE)
            found.append(
                {
                    "layers": subnet.depth,
                    "mean_width": float(np.mean(subnet.widths)),
                    "bits": sorted(set(subnet.bits)),
                    "fp32_gap": float(np.abs(exact - expected).max()),
                    "int8_kl": mean_kl(expected, served),
                    "decoded_kl": mean_kl(expected[READ_AT_ONCE - 1 :], decoded),
                }
            )
        return {"found": found}

    def llama(self) -> Figures:
        """Ours, then llama.cpp, both alone on the machine meanwhile, one length of prompt after the other."""
        full = self.engine.build(self.space.full)
        command = [str(rivals.LLAMA / "python"), "-c", LLAMA, str(rivals.q8_0_file(self.cache))]
        taken: Figures = {"ours": [], "theirs": [], "others_share": []}
        for load in (WORKLOAD, LONG):
            mine = self.engine.bench(full, load, max_seconds=self.seconds)
            arguments = [*command, str(load.prompt_tokens)]
            done = subprocess.run(arguments, check=True, capture_output=True, text=True)
            taken["ours"].append([mine.ttft_ms, mine.tpot_ms])
            taken["theirs"].append(json.loads(done.stdout.splitlines()[-1]))
            taken["others_share"].append(mine.conditions["others_share"])
        return taken

    def _fp32_logits(self, subnet: SubNetwork, ids: np.ndarray) -> np.ndarray:
        made = self.engine.export
        graph = build_graph(
            made.shape,
            made.constants,
            made.tensors(subnet),
            logits="all",
            accuracy_level=FP32_ACTIVATIONS,
        )
        return prefill_logits(open_session(graph, made.folder), made.shape, ids)[0]


def _figures(measured: Measurement) -> Figures:
    wanted = ("ttft_ratio", "tpot_ratio", "reference_ttft_ms", "reference_tpot_ms", "turns", "others_share")
    return {
        "ttft_ms": measured.ttft_ms,
        "tpot_ms": measured.tpot_ms,
        **{name: measured.conditions[name] for name in wanted},
    }
