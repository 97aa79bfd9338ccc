"""The front in LLM.int8, the paper's INT8 (its figure 5 and table 5): size and accuracy before and after.

Decoder linears become INT8 through bitsandbytes, embeddings and head stay in bf16. Sub-networks are those
of --run's front, scored on the run's own report split, or else untuned ones of the starter, scored by
agreement with the unpruned model on wikitext-2. Prints a table, writes a plot, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib
import numpy as np
import torch
from bitsandbytes.nn import Linear8bitLt
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from compressor import models
from compressor.engines.hf_folder import write_hf_folder
from compressor.evaluation.agreement import AgreementText, Predict
from compressor.evaluation.score import Score
from compressor.report.data import ReportData
from compressor.runfolder import RunFolder
from compressor.space import SearchSpace, SubNetwork
from compressor.supernet.folder import save_supernet
from compressor.supernet.importance import rank, sort_neurons

matplotlib.use("Agg")
from matplotlib import pyplot

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of its fp16 at every matrix

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2"
ROWS, LENGTH = 32, 96
CHOICES = ((30, 1536), (28, 1536), (30, 1152), (26, 1536), (26, 1152), (24, 1152))
"""Depth and widest MLP of the untuned sub-networks; every third layer is half as wide."""


@dataclass(frozen=True)
class Row:
    """A sub-network in bf16 and in LLM.int8: bytes of its weights, accuracy, and its 95% interval."""

    layers: int
    mean_width: float
    bf16_bytes: int
    int8_bytes: int
    bf16: float
    bf16_interval: tuple[float, float]
    int8: float
    int8_interval: tuple[float, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a finished run, whose front is taken")
    parser.add_argument("--plot", type=Path, default=Path("runs/llm-int8.png"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.run:
            folder = RunFolder.open_existing(options.run)
            supernet, text = folder.supernet, AgreementText.load(folder.text)
            subnets = _front(folder)
        else:
            supernet, text, subnets = _untuned(Path(scratch) / "supernet")
        rows = sorted(_rows(supernet, subnets, text, Path(scratch)), key=lambda row: -row.bf16_bytes)
    _print(rows)
    _plot(rows, options.plot)
    print(json.dumps({"plot": str(options.plot), "rows": [asdict(row) for row in rows]}))
    return 0


def _front(folder: RunFolder) -> list[SubNetwork]:
    data = TypeAdapter(ReportData).validate_json(folder.front.read_bytes())
    return [candidate.subnet for candidate in data.candidates if candidate.on_front]


def _untuned(folder: Path) -> tuple[Path, AgreementText, list[SubNetwork]]:
    """The starter with its neurons sorted, text to score on, and a staircase of sub-networks."""
    loaded = models.load(models.resolve("starter"), torch.float32)
    parts = {name: (DATA / f"{name}.txt").read_text(encoding="utf-8")[:40_000] for name in ("valid", "test")}
    ids = {name: torch.tensor(loaded.tokenizer(text)["input_ids"]) for name, text in parts.items()}
    importance = rank(loaded.model, [ids["valid"][:2048].reshape(4, 512)])
    sort_neurons(loaded.model, importance)
    text = AgreementText.build(ids["test"][: ROWS * LENGTH].reshape(ROWS, LENGTH), _predict(loaded.model))
    folder.mkdir()
    save_supernet(
        loaded.model.bfloat16(), loaded.tokenizer, importance.drop_order, importance.ordering, folder
    )
    shape = models.shape_of_config(loaded.model.config)
    space = SearchSpace(shape, tuple(d for d, _ in CHOICES), (768, 1152, 1536), importance.drop_order)
    subnets = []
    for depth, widest in CHOICES:
        layers = space.uniform(depth, widest).layers
        whole = (depth, widest) == CHOICES[0]
        widths = tuple(768 if i % 3 == 2 and not whole else widest for i in range(depth))
        subnets.append(SubNetwork(layers, widths))
    return folder, text, subnets


def _rows(supernet: Path, subnets: Sequence[SubNetwork], text: AgreementText, scratch: Path) -> Iterator[Row]:
    for subnet in subnets:
        folder = scratch / subnet.digest
        write_hf_folder(supernet, subnet, folder, {})
        (bf16_bytes, before), (int8_bytes, after) = (_taken(folder, text, int8) for int8 in (False, True))
        yield Row(
            subnet.depth,
            float(np.mean(subnet.widths)),
            bf16_bytes,
            int8_bytes,
            before.value,
            (before.low, before.high),
            after.value,
            (after.low, after.high),
        )


def _taken(folder: Path, text: AgreementText, int8: bool) -> tuple[int, Score]:
    """Bytes and agreement on the report split, as stored or with the decoder's linears in LLM.int8."""
    settings = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if int8 else {}
    with models.quiet_progress():
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.bfloat16, **settings
        )
    quantized = sum(isinstance(module, Linear8bitLt) for module in model.modules())
    assert quantized == (7 * model.config.num_hidden_layers if int8 else 0)
    score = text.score(_predict(model), "report")
    return _stored_bytes(model), score


def _stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights and scales, those that two modules share once."""
    held = {t.data_ptr(): t.nbytes for t in model.state_dict().values() if isinstance(t, torch.Tensor)}
    return sum(held.values())


def _predict(model: PreTrainedModel) -> Predict:
    def predict(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            rows = [model(torch.from_numpy(row[None])).logits.argmax(-1).numpy() for row in ids]
        return np.concatenate(rows)

    return predict


def _print(rows: Sequence[Row]) -> None:
    columns = ("layers", "width", "bf16 MB", "INT8 MB", "ratio", "bf16", "INT8", "change")
    print("".join(f"{name:>9s}" for name in columns))
    for r in rows:
        print(
            f"{r.layers:9d}{r.mean_width:9.0f}{r.bf16_bytes / 1e6:9.4g}{r.int8_bytes / 1e6:9.4g}"
            f"{r.int8_bytes / r.bf16_bytes:9.3f}{r.bf16:9.3f}{r.int8:9.3f}{r.int8 - r.bf16:+9.3f}"
        )


def _plot(rows: Sequence[Row], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, sizes, values, marker in (
        ("bf16", [r.bf16_bytes for r in rows], [(r.bf16, r.bf16_interval) for r in rows], "o"),
        ("LLM.int8", [r.int8_bytes for r in rows], [(r.int8, r.int8_interval) for r in rows], "s"),
    ):
        spread = np.array([(v - low, high - v) for v, (low, high) in values]).T.clip(0)
        axes.errorbar(
            np.array(sizes) / 1e6, [v for v, _ in values], spread, fmt=marker, capsize=2, label=label
        )
    axes.set(xlabel="weights, MB", ylabel="agreement with the unpruned model")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
