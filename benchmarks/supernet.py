"""What ranking and tuning do for a panel of 24 sub-networks of the starter, on real text.

Prints each ordering's effect before tuning, then what the default recipe reaches in its time, then a
shorter tuning beside `paper` ordering and beside plain fine-tuning of the full model at equal steps,
then speed beside transformers' Trainer. Ends with one line of JSON and exits 1 if a bound is missed;
--plot draws the loss curves. Needs ../shared/data; says so and exits 0 without it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from verdict import Bound, conclude

from compressor import models
from compressor.compute import cpu_matmul_flops, fastest_cpu_dtype
from compressor.engines.memory import peak_bytes
from compressor.events import LossReported
from compressor.space import SearchSpace, SubNetwork, flops_per_token
from compressor.supernet.config import SUPER_EVERY_WITH_LABELS
from compressor.supernet.data import Examples, load_training_data
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, finetune
from compressor.supernet.importance import rank, sort_neurons
from compressor.supernet.losses import cross_entropy
from compressor.supernet.targets import final_states

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

DEPTHS, WIDTHS = (22, 24, 26, 28, 30), (768, 1152, 1536)
LENGTH, BATCH = 256, 8
FULL_ROWS = 24
"""Held-out rows that the full model is scored on; the panel has as many or fewer."""
STEPS, SPEED_ROUNDS = 6, 2
PARTS = ("orderings", "tuning", "recipes", "speed")
SMOOTHED = 10
"""Losses of one kind that a running mean in the plot covers."""
RECIPE = FinetuneConfig(loss="cross-entropy", super_every=SUPER_EVERY_WITH_LABELS)
"""What `compress --train-data` does with labelled rows."""
BOUNDS = {
    "panel_gain_nat": 0.5,
    "full_gain_nat": 0.0,
    "over_paper_nat": 0.0,
    "over_full_only_nat": 0.0,
    "super_speed_ratio": 0.9,
    "matmul_share": 0.25,
    "memory_ratio": 1.1,
}
AT_MOST = {"memory_ratio"}
ORDERINGS = (
    ("paper", "paper"),
    ("magnitude", "paper"),
    ("activation", "paper"),
    ("rms", "paper"),
    ("taylor", "paper"),
    ("paper", "block-influence"),
    ("paper", "leave-one-out"),
    ("paper", "greedy"),
    ("rms", "block-influence"),
    ("rms", "leave-one-out"),
    ("rms", "greedy"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40, help="of the default recipe's tuning")
    parser.add_argument("--steps", type=int, default=24, help="of each recipe that is compared")
    parser.add_argument("--panel", type=int, default=24, help="sub-networks of the panel")
    parser.add_argument("--rows", type=int, default=6, help="rows of 256 tokens that the panel is scored on")
    parser.add_argument("--plot", type=Path, help="write the loss curves there (SVG or PNG)")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    if options.plot and not {"tuning", "recipes"} & set(parts):
        parser.error("--plot draws what tuning and recipes measure: ask for one of these parts")
    if not DATA.is_dir():
        print(f"no data sets at {DATA}: nothing measured")
        return 0
    bench = Bench(options.panel, options.rows)
    figures: dict[str, float] = {}
    measures = {
        "orderings": bench.orderings,
        "tuning": lambda: bench.tuning(options.minutes),
        "recipes": lambda: bench.recipes(options.steps),
        "speed": speed,
    }
    for part in parts:
        figures |= measures[part]()
    bounds = [
        Bound(name, figures[name], bound, name in AT_MOST)
        for name, bound in BOUNDS.items()
        if name in figures
    ]
    code = conclude(bounds, {"figures": figures})
    if options.plot:
        plot(bench.curves, options.plot)
    return code


@dataclass
class Bench:
    """The starter, its training rows, and what its sub-networks are scored on."""

    panel_size: int
    rows: int

    def __post_init__(self) -> None:
        self.curves: dict[str, list[LossReported]] = {}
        self.source = models.resolve("starter")
        self.dtype = fastest_cpu_dtype()
        tokenizer = models.load(self.source).tokenizer
        alpaca = load_training_data(str(DATA / "alpaca" / "train.jsonl"), tokenizer, LENGTH)
        gsm8k = load_training_data(str(DATA / "gsm8k" / "train.jsonl"), tokenizer, LENGTH)
        train, self.held_out = alpaca.split(FULL_ROWS)
        self.train = Examples(torch.cat([train.ids, gsm8k.ids]), torch.cat([train.labels, gsm8k.labels]))
        wikitext = load_training_data(str(next((DATA / "wikitext2").glob("*valid*"))), tokenizer, LENGTH)
        self.wikitext = _first(wikitext, self.rows)
        self.few_held_out = _first(self.held_out, self.rows)

    def orderings(self) -> dict[str, float]:
        """Mean loss of the panel under each ordering, nothing tuned."""
        print(f"{'neurons':<12}{'layers':<18}{'alpaca':>8}{'wikitext2':>11}   nats a token, untuned panel")
        for neurons, layers in ORDERINGS:
            elastic, space = self._sorted(neurons, layers)
            panel = self._panel(space)
            alpaca = self._mean_loss(elastic, panel, self.few_held_out)
            wikitext = self._mean_loss(elastic, panel, self.wikitext)
            print(f"{neurons:<12}{layers:<18}{alpaca:>8.3f}{wikitext:>11.3f}", flush=True)
        return {}

    def tuning(self, minutes: float) -> dict[str, float]:
        """What the default recipe reaches in that time."""
        self._head()
        timed = replace(RECIPE, steps=10**6, minutes=minutes)
        found, steps = self._tuned("default, timed", ("rms", "greedy"), timed, self.train)
        return {
            "steps": steps,
            "panel_gain_nat": found["panel_before"] - found["panel_after"],
            "full_gain_nat": found["full_before"] - found["full_after"],
        }

    def recipes(self, steps: int) -> dict[str, float]:
        """The default recipe and two others, each for so many steps on the same rows."""
        self._head()
        rows = self.train.some(steps * RECIPE.batch, seed=0)
        short = replace(RECIPE, steps=steps)
        default, _ = self._tuned("default", ("rms", "greedy"), short, rows)
        paper, _ = self._tuned("paper ordering", ("paper", "paper"), short, rows)
        full, _ = self._tuned("full model only", ("rms", "greedy"), replace(short, super_every=1), rows)
        return {
            "over_paper_nat": paper["panel_after"] - default["panel_after"],
            "over_full_only_nat": full["panel_after"] - default["panel_after"],
        }

    def super_rate(self) -> float:
        """Tokens a second of the super-network's steps, all parameters tuned, as Trainer does."""
        config = FinetuneConfig(steps=STEPS, loss="cross-entropy", super_every=1, train_embeddings=True)
        return self._rate(*self._sorted("paper", "paper"), config)

    def sub_rate(self) -> float:
        """The same of the smallest sub-network's steps."""
        elastic, space = self._sorted("paper", "paper")
        small = SearchSpace(space.shape, DEPTHS[:1], WIDTHS[:1], space.drop_order)
        config = FinetuneConfig(steps=STEPS, loss="cross-entropy", super_every=0, train_embeddings=True)
        return self._rate(elastic, small, config)

    def _head(self) -> None:
        head = ("recipe", "panel before", "after", "full before", "after", "wikitext2 after")
        print(("{:<26}" + "{:>14}" * 4 + "{:>17}").format(*head))

    def _sorted(self, neurons: Any, layers: Any) -> tuple[Elastic, SearchSpace]:
        model = models.load(self.source, self.dtype).model
        calibration = self.train.ids[:16]
        importance = rank(model, [calibration[:8], calibration[8:]], neurons, layers, drops=30 - DEPTHS[0])
        sort_neurons(model, importance)
        shape = models.shape_of_config(model.config)
        return Elastic(model), SearchSpace(shape, DEPTHS, WIDTHS, importance.drop_order)

    def _panel(self, space: SearchSpace) -> list[SubNetwork]:
        rng = np.random.default_rng(24)
        return [space.sample(rng) for _ in range(self.panel_size)]

    @torch.inference_mode()
    def _mean_loss(self, elastic: Elastic, panel: list[SubNetwork], examples: Examples) -> float:
        """Mean negative log-likelihood (nats a counted token) of all sub-networks."""
        total = 0.0
        for subnet in panel:
            with elastic.activated(subnet) as model:
                hidden = final_states(model, examples.ids).flatten(0, 1)
                total += float(
                    cross_entropy(hidden, examples.labels[:, 1:].flatten(), model.lm_head.weight.detach())
                )
        return total / len(panel)

    def _tuned(
        self, name: str, ordering: tuple[str, str], config: FinetuneConfig, rows: Examples
    ) -> tuple[dict[str, float], int]:
        elastic, space = self._sorted(*ordering)
        panel = self._panel(space)
        found = {
            "panel_before": self._mean_loss(elastic, panel, self.few_held_out),
            "full_before": self._mean_loss(elastic, [space.full], self.held_out),
        }
        curve: list[LossReported] = []

        def listen(event: Any) -> None:
            if isinstance(event, LossReported):
                curve.append(event)

        result = finetune(elastic, space, rows, config, listen)
        title = f"{name} ({result.steps} steps)"
        self.curves[title] = curve
        found["panel_after"] = self._mean_loss(elastic, panel, self.few_held_out)
        found["full_after"] = self._mean_loss(elastic, [space.full], self.held_out)
        wikitext = self._mean_loss(elastic, panel, self.wikitext)
        order = ("panel_before", "panel_after", "full_before", "full_after")
        figures = [*(found[key] for key in order), wikitext]
        line = ("{:<26}" + "{:>14.3f}" * 4 + "{:>17.3f}").format(title, *figures)
        print(f"{line}  in {result.seconds / 60:.1f} min", flush=True)
        for network in ("super", "sub"):
            losses = [event.loss for event in curve if event.network == network]
            if not losses:
                continue
            tenths = [part.mean() for part in np.array_split(losses, min(10, len(losses)))]
            print(f"  {network} loss: " + " ".join(f"{loss:.3f}" for loss in tenths), flush=True)
        return found, result.steps

    def _rate(self, elastic: Elastic, space: SearchSpace, config: FinetuneConfig) -> float:
        times: list[float] = []
        rows = Examples(self.train.ids[:64], self.train.labels[:64])
        finetune(elastic, space, rows, config, lambda _: times.append(time.monotonic()))
        steps = times[1::2]  # each step reports its loss and its progress
        return config.batch * LENGTH * (len(steps) - 2) / (steps[-1] - steps[1])

    def trainer_rate(self) -> float:
        """The same of transformers' Trainer with its defaults."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        times: list[float] = []

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.monotonic())

        model = models.load(self.source, self.dtype).model
        rows = [
            {"input_ids": ids, "labels": labels}
            for ids, labels in zip(self.train.ids[:64], self.train.labels[:64], strict=True)
        ]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            )
            Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
        return BATCH * LENGTH * (len(times) - 2) / (times[-1] - times[1])


def _first(examples: Examples, rows: int) -> Examples:
    return Examples(examples.ids[:rows], examples.labels[:rows])


def plot(curves: dict[str, list[LossReported]], path: Path) -> None:
    """The losses of super-network and of sub-networks, step by step, with their running means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, grid = pyplot.subplots(
        1, len(curves), figsize=(4.2 * len(curves), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    labels = {"super": "super-network", "sub": "a random sub-network"}
    for axes, (title, curve) in zip(grid[0], curves.items(), strict=True):
        for network, color in (("super", "C0"), ("sub", "C1")):
            taken = [event for event in curve if event.network == network]
            if not taken:
                continue
            steps, losses = [event.step for event in taken], np.array([event.loss for event in taken])
            window = min(SMOOTHED, max(1, len(losses) // 4))
            means = [losses[max(0, i - window + 1) : i + 1].mean() for i in range(len(losses))]
            axes.plot(steps, losses, ".", markersize=3, alpha=0.4, color=color)
            axes.plot(steps, means, color=color, label=labels[network])
        axes.set(title=title, xlabel="step", yscale="log")
        axes.yaxis.set_major_locator(FixedLocator((1, 2, 3, 5, 10, 20, 30)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    grid[0][0].set(ylabel="loss of the step, nats a token")
    grid[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def speed() -> dict[str, float]:
    """Speed and peak memory of our steps and of Trainer's, each in a process of its own, in turns."""
    rates: dict[str, list[float]] = {name: [] for name in ("super_rate", "sub_rate", "trainer_rate")}
    peaks: dict[str, float] = {}
    for _ in range(SPEED_ROUNDS):
        for name, found in rates.items():
            with get_context("spawn").Pool(1) as pool:
                rate, peaks[name] = pool.apply(_measured, (name,))
            found.append(rate)
    ours, small, trainer = (statistics.median(found) for found in rates.values())
    shape = models.read_shape(models.resolve("starter"))
    widest = SearchSpace(shape, DEPTHS, WIDTHS).full
    narrowest = SubNetwork(widest.layers[: DEPTHS[0]], (WIDTHS[0],) * DEPTHS[0])
    flops, fewer = (3 * flops_per_token(shape, subnet, LENGTH) for subnet in (widest, narrowest))
    matmul = cpu_matmul_flops()
    print(f"{'steps of':<28}{'tok/s':>8}{'peak GiB':>10}{'TFLOP/s':>9}")
    rows = (("super-network", ours, flops, "super_rate"), ("smallest sub-network", small, fewer, "sub_rate"))
    for title, rate, each, name in (*rows, ("Trainer", trainer, flops, "trainer_rate")):
        print(f"{title:<28}{rate:>8.0f}{peaks[name]:>10.2f}{rate * each / 1e12:>9.3f}")
    print(
        "matrix products: " + ", ".join(f"{value / 1e12:.2f} TFLOP/s in {k}" for k, value in matmul.items())
    )
    pairs = zip(rates["super_rate"], rates["trainer_rate"], strict=True)
    return {
        "super_speed_ratio": statistics.median(mine / its for mine, its in pairs),
        "matmul_share": ours * flops / max(matmul.values()),
        "sub_over_super": small / ours,
        "sub_over_super_by_flops": flops / fewer,
        "memory_ratio": peaks["super_rate"] / peaks["trainer_rate"],
    }


def _measured(name: str) -> tuple[float, float]:
    """Tokens a second of one kind of step, and this process's peak memory in GiB."""
    rate = getattr(Bench(0, 1), name)()
    return rate, peak_bytes() / 2**30  # getrusage would count what the parent held as it started this


if __name__ == "__main__":
    sys.exit(main())
