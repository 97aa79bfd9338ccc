"""The packaged INT8 graph of the starter beside other forms of it: what was tried to decode faster.

The packaged graph keeps keys and values in fp32; served with ``kv_cache = "int8"`` it is changed as it is
loaded, which is the second row.

    python benchmarks/decode_variants.py [--rounds 10]

All are loaded at once and take turns step by step. Prints by how much each takes longer or shorter than the
packaged form, and how far INT8 inputs (and the keys and values of its kind) move its predictions. The first
row is the packaged form once more, so the noise. Without ../shared/data divergences are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from measure_units import Bench  # noqa: E402

from compressor.engines import onnx_session, quantize  # noqa: E402
from compressor.engines.onnx_cache import cache_scales  # noqa: E402
from compressor.engines.onnx_graph import FP32_ACTIVATIONS, INT8_ACTIVATIONS, build_graph  # noqa: E402
from compressor.engines.onnx_session import Decoder, open_session, prefill_logits  # noqa: E402
from compressor.engines.onnx_store import Export, TensorRef  # noqa: E402
from compressor.engines.onnx_verify import mean_kl  # noqa: E402
from compressor.int8_cache import keep_in_int8  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
PROMPTS = (128, 512)
STEPS = 12
"""Of each form, in turns, after every prompt."""
TOKENS = 500
NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"

Graph = onnx.ModelProto
Change = Callable[[Graph], None]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Variant:
    """Changes to the packaged graph: to its weights' rounding or layout, and to its attention."""

    name: str
    weights: Change | None = None
    attention: Change | None = None
    flash: bool = True
    huge_pages: bool = True


class Starter:
    """The whole starter as a run exports it, and its graphs."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.export: Export = bench.engine.export
        self.tensors: dict[str, TensorRef] = self.export.tensors(bench.space.full)

    def graph(self, *changes: Change | None, every: bool = False, level: int = INT8_ACTIVATIONS) -> Graph:
        logits = "all" if every else "last"
        graph = build_graph(
            self.export.shape, self.export.constants, self.tensors, logits=logits, accuracy_level=level
        )
        for change in changes:
            if change is not None:
                change(graph)
        return graph

    def session(self, graph: Graph) -> ort.InferenceSession:
        return open_session(graph, self.export.folder)

    def logits(self, graph: Graph, ids: Ids) -> npt.NDArray[np.float32]:
        """[tokens, vocabulary] of ``ids`` [1, tokens]; a prompt of its own, onto an empty cache."""
        session, shape = self.session(graph), self.export.shape
        if session.get_inputs()[2].type == "tensor(float)":
            return prefill_logits(session, shape, ids)[0]
        decoder = Decoder(session, shape, 1, ids.shape[1])  # whose buffer the logits live in
        return decoder.step(ids)[0].copy()

    def stored(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.export.read(self.tensors[name])))

    def text(self, part: str) -> Ids:
        from transformers import AutoTokenizer

        text = (DATA / "wikitext2" / f"{part}.txt").read_text(encoding="utf-8")[:5000]
        tokenizer = AutoTokenizer.from_pretrained(self.bench.supernet)
        return np.array([tokenizer(text).input_ids[:TOKENS]], np.int64)


def variants(starter: Starter) -> list[Variant]:
    return [
        Variant("as packaged, again"),
        Variant("keys and values in INT8, as served", attention=served_cache(starter)),
        Variant("keys and values in INT8, its kernels for prompts too", attention=int8_cache(starter)),
        Variant("weights on ordinary pages", huge_pages=False),
        Variant("blocks of 32 weights", weights=in_blocks(starter, 32)),
        Variant("blocks of 128 weights", weights=in_blocks(starter, 128)),
        Variant("blocks of 128, down projections alone", weights=in_blocks(starter, 128, ".down")),
        Variant("gate and up projection as one matrix", weights=one_gate_and_up(starter)),
        Variant("attention without its flash kernel", flash=False),
        Variant("keys and values in fp16", attention=fp16_cache),
    ]


def in_blocks(starter: Starter, block: int, kind: str = "") -> Change:
    """Matrices whose name ends in ``kind`` in 8 bits with a scale for every ``block`` weights."""

    def change(graph: Graph) -> None:
        for node in _matmuls(graph):
            stem = _stem(node)
            if not stem.endswith(kind):
                continue
            attributes = {attribute.name: attribute for attribute in node.attribute}
            stored = starter.stored(f"{stem}.weight"), starter.stored(f"{stem}.scales")
            weight = quantize.Quantized(*stored, None, 8).values(attributes["K"].i)
            rows, columns = weight.shape
            blocks = torch.nn.functional.pad(weight, (0, -columns % block)).view(rows, -1, block)
            scales = (blocks.abs().amax(-1) / 127).clamp_min(1e-8)
            integers = (blocks / scales[..., None]).round_().add_(128).to(torch.uint8)
            attributes["block_size"].i = block
            _store(graph, node, integers, scales)

    return change


def one_gate_and_up(starter: Starter) -> Change:
    """Gate and up projections multiplied at once and split after."""

    def change(graph: Graph) -> None:
        nodes = list(graph.graph.node)
        ups = {_stem(node): node for node in _matmuls(graph) if _stem(node).endswith(".up")}
        del graph.graph.node[:]
        for node in nodes:
            stem = _stem(node) if node.op_type == "MatMulNBits" else ""
            if stem in ups:
                continue
            graph.graph.node.append(node)
            if not stem.endswith(".gate"):
                continue
            node = graph.graph.node[-1]
            up = stem.removesuffix("gate") + "up"
            parts = [torch.cat([starter.stored(f"{name}.{part}") for name in (stem, up)])
                     for part in ("weight", "scales")]  # fmt: skip
            next(attribute for attribute in node.attribute if attribute.name == "N").i = len(parts[0])
            halves = [node.output[0], ups[up].output[0]]
            node.output[0] = f"{stem}.both"
            _store(graph, node, parts[0], parts[1].float())
            split = helper.make_node("Split", [f"{stem}.both"], halves, f"{stem}.halves", axis=-1)
            split.attribute.append(helper.make_attribute("num_outputs", 2))
            graph.graph.node.append(split)

    return change


def fp16_cache(graph: Graph) -> None:
    """Attention in fp16, between casts."""
    nodes = list(graph.graph.node)
    del graph.graph.node[:]
    for node in nodes:
        if node.op_type != "GroupQueryAttention":
            graph.graph.node.append(node)
            continue
        for place in (0, 7, 8):  # packed queries, keys and values; cosines; sines
            narrow = f"{node.input[place]}.fp16"
            if not any(narrow in other.output for other in graph.graph.node):
                graph.graph.node.append(_cast(node.input[place], narrow, TensorProto.FLOAT16))
            node.input[place] = narrow
        wide, node.output[0] = node.output[0], f"{node.output[0]}.fp16"
        graph.graph.node.append(node)
        graph.graph.node.append(_cast(node.output[0], wide, TensorProto.FLOAT))
    _retype_cache(graph, TensorProto.FLOAT16)


def served_cache(starter: Starter) -> Change:
    """Keys and values in INT8, with INT8 kernels for single tokens alone."""

    def change(graph: Graph) -> None:
        graph.CopyFrom(keep_in_int8(graph, cache_scales(starter.export)))

    return change


def int8_cache(starter: Starter) -> Change:
    """Keys and values in INT8, and INT8 kernels for all that attends to them."""
    scales = cache_scales(starter.export)

    def change(graph: Graph) -> None:
        attentions = (node for node in graph.graph.node if node.op_type == "GroupQueryAttention")
        for layer, node in enumerate(attentions):
            names = [f"{name}.scale" for name in node.input[3:5]]
            for name, part in zip(names, (scales.keys, scales.values), strict=True):
                graph.graph.initializer.append(numpy_helper.from_array(part[layer][None, :, None], name))
            node.input.extend([""] * (12 - len(node.input)) + names)
            for attribute, value in (
                ("k_quant_type", "PER_CHANNEL"),
                ("v_quant_type", "PER_CHANNEL"),
                ("kv_cache_bit_width", 8),
            ):
                node.attribute.append(helper.make_attribute(attribute, value))
        _retype_cache(graph, TensorProto.INT8)

    return change


def divergence(starter: Starter, variant: Variant, ids: Ids) -> float:
    """Nats a token by which INT8 inputs, and the attention's change, move what the same weights predict."""
    exact = starter.logits(starter.graph(variant.weights, every=True, level=FP32_ACTIVATIONS), ids)
    with flash_attention(variant.flash):
        served = starter.logits(starter.graph(variant.weights, variant.attention, every=True), ids)
    return mean_kl(exact, served)


def timed(decoders: Mapping[str, Decoder], prompt: Ids, rounds: int) -> Iterator[tuple[str, float, float]]:
    """Name, prefill's and a step's time as a part of the first decoder's: medians of turns' ratios."""
    names = list(decoders)
    prefills: dict[str, list[float]] = {name: [] for name in names}
    steps: dict[str, list[float]] = {name: [] for name in names}
    token = np.array([[17]], np.int64)
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order:
            decoders[name].restart()
            prefills[name].append(_seconds(decoders[name], prompt))
        for _ in range(STEPS):
            for name in order:
                steps[name].append(_seconds(decoders[name], token))
    for name in names[1:]:
        yield name, *(float(np.median(np.divide(of[name], of[names[0]]))) for of in (prefills, steps))


@contextmanager
def pages(huge: bool) -> Iterator[None]:
    """Whether sessions opened within have their weights on huge pages."""
    usual = onnx_session.on_huge_pages
    if not huge:
        onnx_session.on_huge_pages = nullcontext
    try:
        yield
    finally:
        onnx_session.on_huge_pages = usual


@contextmanager
def flash_attention(wanted: bool) -> Iterator[None]:
    """Whether sessions opened within use ONNX Runtime's flash kernel, which it asks its environment."""
    if not wanted:
        os.environ[NO_FLASH] = "1"
    try:
        yield
    finally:
        os.environ.pop(NO_FLASH, None)


def _seconds(decoder: Decoder, ids: Ids) -> float:
    began = perf_counter()
    decoder.step(ids)
    return perf_counter() - began


def _matmuls(graph: Graph) -> list[onnx.NodeProto]:
    return [node for node in graph.graph.node if node.op_type == "MatMulNBits"]


def _stem(node: onnx.NodeProto) -> str:
    return node.input[1].removesuffix(".weight")


def _store(graph: Graph, node: onnx.NodeProto, integers: torch.Tensor, scales: torch.Tensor) -> None:
    """Other weights for a node, held in the graph."""
    for place, values in ((1, integers), (2, scales)):
        node.input[place] += ".other"
        graph.graph.initializer.append(numpy_helper.from_array(values.numpy(), node.input[place]))


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}.cast", to=kind)


def _retype_cache(graph: Graph, kind: int) -> None:
    for entry in (*graph.graph.input, *graph.graph.output):
        if entry.name.startswith(("past_key_values", "present")):
            entry.type.tensor_type.elem_type = kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "bench-measure")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    starter = Starter(Bench(options.cache, DATA, 0.0))
    tried = variants(starter)
    figures: dict[str, dict[str, float]] = {variant.name: {} for variant in tried}
    if DATA.is_dir():
        ids = starter.text("test")
        for variant in tried:
            figures[variant.name]["divergence_nats"] = divergence(starter, variant, ids)
    decoders = {}
    for variant in (Variant("as packaged"), *tried):
        with flash_attention(variant.flash), pages(variant.huge_pages):
            session = starter.session(starter.graph(variant.weights, variant.attention))
        decoders[variant.name] = Decoder(session, starter.export.shape, 1, max(PROMPTS) + STEPS)
    rng = np.random.default_rng(0)
    for tokens in PROMPTS:
        prompt = rng.integers(17, 40000, (1, tokens))
        for name, prefill, step in timed(decoders, prompt, options.rounds):
            figures[name] |= {f"prefill_{tokens}": prefill, f"decode_{tokens}": step}
    print(f"{'':52s}{'decode after':>16s}{'prefill of':>20s}")
    print(f"{'time as a part of the packaged form’s':52s}" + 2 * "".join(f"{n:>9d}" for n in PROMPTS)
          + f"{'nats a token':>16s}")  # fmt: skip
    for name, of in figures.items():
        columns = [of[f"{what}_{tokens}"] for what in ("decode", "prefill") for tokens in PROMPTS]
        moved = of.get("divergence_nats", float("nan"))
        print(f"{name:52s}" + "".join(f"{value:9.3f}" for value in columns) + f"{moved:16.4f}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
