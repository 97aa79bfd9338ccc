"""What a run's winner is worth beside what takes seconds: the unpruned model in each number of bits.

Makes a run of the starter (``--run`` takes one that is finished), then computes, in the engine that serves,
the winner and every form of the unpruned model on wikitext-2 and on the run's own unseen text: bytes,
perplexity, divergence from the unpruned model in fp32, share of equal first choices; and times winner and
forms in turns. llama.cpp's quantizations join where ``make setup-llama`` was run. Prints a table, draws
``--plot``, and ends with one line of JSON. Exits 1 if a bound is missed: what rounding alone must reach, and
what the winner must.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import numpy.typing as npt
import torch
from free_llama import llama_rows
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from verdict import Bound, conclude

from compressor.engines.onnxruntime import OnnxCandidate, OnnxRuntimeEngine
from compressor.evaluation.agreement import SKIPPED_POSITIONS, AgreementText
from compressor.manifest import read_manifest
from compressor.profile import Workload
from compressor.runfolder import RunFolder, Weights
from compressor.space import SubNetwork, weight_bytes

ROOT = Path(__file__).resolve().parents[1]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext2" / "test.txt"
TOKENS, LENGTH = 4096, 512
NEAREST_SYMMETRIC = {"INT4": 0.389, "INT4, embeddings INT8": 0.279}
"""Divergence on the same tokens of what INT4 was before: to the nearest, without zero points."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """Token ids [sequences, length] of both texts, and the unpruned model's log-probabilities on them."""

    ids: dict[str, Ids]
    expected: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One form of the model: its bytes, and how near it is to the unpruned one on both texts."""

    name: str
    bytes: int
    perplexity: float
    kl: dict[str, float]
    agreement: dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "build" / "bench-free", help="made if absent")
    parser.add_argument("--profile", default="starter-cpu")
    parser.add_argument("--memory-budget", help="GiB; the profile's unless given")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seconds", type=float, default=20.0, help="longest time to measure a pair in turns")
    parser.add_argument("--plot", type=Path, default=ROOT / "build" / "bench-free.png")
    options = parser.parse_args()
    if not WIKITEXT.is_file():
        print(f"wikitext-2 is not at {WIKITEXT}: the benchmark needs it")
        return 1
    _make_run(options)
    folder = RunFolder.open_existing(options.run)
    texts = _texts(folder)
    base, winner = _engine(folder.unpruned), _winner_engine(folder)
    shape = base.export.shape
    layers, widths = tuple(range(shape.num_layers)), (shape.intermediate_size,) * shape.num_layers
    forms = {
        "INT8": SubNetwork(layers, widths),
        "INT4, embeddings INT8": SubNetwork(layers, widths, (4,) * len(layers)),
        "INT4": SubNetwork(layers, widths, (4,) * len(layers), (4, 4)),
    }
    entries = [_entry(name, base, subnet, texts) for name, subnet in forms.items()]
    own = SubNetwork.from_dict(read_manifest(folder.package).architecture.model_dump())
    entries.append(_entry("winner", winner, own, texts))
    rivals = llama_rows(folder, texts.ids, texts.expected)
    ratios = {name: _in_turns(winner, own, base, forms[name], options.seconds) for name in ("INT4", "INT8")}
    return _report(entries, [Entry(**row) for row in rivals], ratios, options.plot)


def _make_run(options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "compressor.cli", "--model", "starter", "--profile", options.profile]
    command += ["--preset", options.preset, "--run", str(options.run), "--resume"]
    if options.memory_budget:
        command += ["--memory-budget", options.memory_budget]
    if not (options.run / "front.json").is_file():
        subprocess.run(command, check=True)


def _engine(weights: Weights) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(weights.export)


def _winner_engine(folder: RunFolder) -> OnnxRuntimeEngine:
    digest = SubNetwork.from_dict(read_manifest(folder.package).architecture.model_dump()).digest
    return _engine(folder.weights_of(digest))


def _texts(folder: RunFolder) -> Texts:
    """wikitext-2's first test tokens, and the half of the run's own text that its search never saw."""
    tokenizer = AutoTokenizer.from_pretrained(folder.base)
    text = WIKITEXT.read_text(encoding="utf-8")[: 12 * TOKENS]
    wiki = np.array(tokenizer(text)["input_ids"][:TOKENS], np.int64).reshape(-1, LENGTH)
    kept = AgreementText.load(folder.text)
    ids = {"wikitext-2": wiki, "own text": kept.ids[kept.rows("report")]}
    model = AutoModelForCausalLM.from_pretrained(folder.base, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = {
            name: torch.cat([model(torch.from_numpy(row[None])).logits.log_softmax(-1) for row in rows])
            for name, rows in ids.items()
        }
    return Texts(ids, expected)


def _entry(name: str, engine: OnnxRuntimeEngine, subnet: SubNetwork, texts: Texts) -> Entry:
    candidate = engine.build(subnet)
    found = {text: _near(engine, candidate, ids, texts.expected[text]) for text, ids in texts.ids.items()}
    return Entry(
        name,
        weight_bytes(engine.export.shape, subnet, "int8"),
        found["wikitext-2"][2],
        {text: figures[0] for text, figures in found.items()},
        {text: figures[1] for text, figures in found.items()},
    )


def _near(
    engine: OnnxRuntimeEngine, candidate: OnnxCandidate, ids: Ids, expected: torch.Tensor
) -> tuple[float, float, float]:
    """Divergence (nats a token), share of equal first choices, and perplexity."""
    sums = np.zeros(3)
    for row, wanted in zip(ids, expected, strict=True):
        found = torch.from_numpy(engine.logits(candidate, row)).log_softmax(-1)
        sums += nearness(torch.from_numpy(row), wanted, found)
    divergence, same, nll = sums / len(ids)
    return float(divergence), float(same), float(np.exp(nll))


def nearness(ids: torch.Tensor, wanted: torch.Tensor, found: torch.Tensor) -> tuple[float, float, float]:
    """Mean divergence, share of equal first choices, and NLL along one sequence; log-probabilities
    [tokens, vocabulary]. The first positions, which hardly have any context, tell nothing of the choices."""
    late = slice(SKIPPED_POSITIONS, None)
    divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
    same = (wanted[late].argmax(-1) == found[late].argmax(-1)).float().mean()
    nll = -found[:-1].gather(-1, ids[1:, None]).mean()
    return float(divergence), float(same), float(nll)


def _in_turns(
    winner: OnnxRuntimeEngine, own: SubNetwork, base: OnnxRuntimeEngine, form: SubNetwork, seconds: float
) -> dict[str, float]:
    """The winner's times over a form's, measured in turns."""
    workload = Workload(prompt_tokens=128, output_tokens=64, concurrency=1)
    mine, theirs = winner.build(own), base.build(form)
    first, second = winner.runner(mine, workload), base.runner(theirs, workload)
    from compressor.engines.paired import time_pair

    ratio = time_pair(first, second, workload, max_seconds=seconds, precision=0.01)[2].to_dict()
    return {"prefill": ratio["ttft_ratio"], "decode": ratio["tpot_ratio"]}


def _report(
    entries: list[Entry], rivals: list[Entry], ratios: dict[str, dict[str, float]], plot: Path
) -> int:
    table = Table("", "MB", "perplexity", "KL, wikitext-2", "same first choice", "KL, own text", "agreement")
    for entry in sorted([*entries, *rivals], key=lambda entry: entry.bytes):
        figures = [f"{entry.kl[t]:.4f} {entry.agreement[t]:.1%}".split() for t in ("wikitext-2", "own text")]
        cells = [f"{entry.bytes / 1e6:.1f}", f"{entry.perplexity:.2f}", *figures[0], *figures[1]]
        table.add_row(entry.name, *cells, style="bold" if entry.name == "winner" else "")
    Console(width=120).print(table)
    for name, ratio in ratios.items():
        print(
            f"the winner in turns with {name}: prefill {ratio['prefill']:.3f}, decode {ratio['decode']:.3f}"
        )
    _draw(entries, rivals, plot)
    of = {entry.name: entry for entry in entries}
    winner, int4, mixed = of["winner"], of["INT4"], of["INT4, embeddings INT8"]
    same_bytes = [e for e in (*entries, *rivals) if e.name != "winner" and e.bytes <= 1.01 * winner.bytes]
    rival = max(same_bytes, key=lambda e: e.agreement["own text"], default=int4)
    bounds = [
        Bound("MB of INT4", int4.bytes / 1e6, 77.7),
        Bound("KL of INT4 on wikitext-2", int4.kl["wikitext-2"], 0.18),
        Bound("MB of INT4 with embeddings in INT8", mixed.bytes / 1e6, 90.6),
        Bound("KL of that on wikitext-2", mixed.kl["wikitext-2"], 0.095),
        Bound(
            "winner's agreement less the best rival's of its bytes, points", _points(winner, rival), 0, False
        ),
    ]
    if winner.bytes <= 1.01 * int4.bytes:
        bounds += [
            Bound(f"KL over INT4's, {text}", winner.kl[text] / int4.kl[text], 0.6)
            for text in ("wikitext-2", "own text")
        ]
        bounds.append(Bound("agreement above INT4's, points", _points(winner, int4), 5, at_most=False))
    bounds += [
        Bound("decode over INT4's", ratios["INT4"]["decode"], 1.02),
        Bound("prefill over INT4's", ratios["INT4"]["prefill"], 1.02),
        Bound("prefill over INT8's", ratios["INT8"]["prefill"], 1.02),
    ]
    rows = [asdict(entry) for entry in (*entries, *rivals)]
    return conclude(bounds, {"rows": rows, "ratios": ratios, "before": NEAREST_SYMMETRIC})


def _points(one: Entry, other: Entry) -> float:
    return 100 * (one.agreement["own text"] - other.agreement["own text"])


def _draw(entries: list[Entry], rivals: list[Entry], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for entry in (*entries, *rivals):
        marker, colour = ("s", "#777777") if entry in rivals else ("D", "#007a5a")
        if entry.name == "winner":
            marker, colour = "*", "#d55e00"
        axes.plot(entry.bytes / 1e6, 100 * entry.agreement["own text"], marker, color=colour, markersize=9)
        axes.annotate(
            entry.name,
            (entry.bytes / 1e6, 100 * entry.agreement["own text"]),
            xytext=(5, 5),
            textcoords="offset points",
        )
    axes.set_xlabel("weights (MB)")
    axes.set_ylabel("agreement with the unpruned model, unseen own text (%)")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
