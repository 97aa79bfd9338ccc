"""What ranking and tuning do for a panel of 24 sub-networks of the starter, on real text.

Prints each ordering's effect before tuning, then tuning with the default recipe beside `paper`
ordering and beside plain fine-tuning of the full model at equal steps, then speed beside
transformers' Trainer. Ends with one line of JSON and exits 1 if a bound is missed. Needs
../shared/data; says so and exits 0 without it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from verdict import Bound, conclude

from compressor import models
from compressor.events import LossReported
from compressor.space import SearchSpace, SubNetwork, flops_per_token
from compressor.supernet.data import Examples, load_training_data
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, finetune
from compressor.supernet.importance import rank, sort_neurons
from compressor.supernet.losses import cross_entropy
from compressor.supernet.targets import final_states

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

DEPTHS, WIDTHS = (22, 24, 26, 28, 30), (768, 1152, 1536)
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
    ("rms", "greedy"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40, help="of each tuning")
    parser.add_argument("--panel", type=int, default=24, help="sub-networks of the panel")
    parser.add_argument("--rows", type=int, default=24, help="held-out rows of 256 tokens")
    parser.add_argument("--parts", default="orderings,tuning,speed", help="what to measure")
    options = parser.parse_args()
    if not DATA.is_dir():
        print(f"no data sets at {DATA}: nothing measured")
        return 0
    bench = Bench(options.panel, options.rows)
    figures: dict[str, float] = {}
    for part in options.parts.split(","):
        figures |= {"orderings": bench.orderings, "speed": bench.speed}.get(
            part, lambda: bench.tuning(options.minutes)
        )()
    bounds = {"panel_gain_nat": 0.5, "full_gain_nat": 0.0, "super_speed_ratio": 0.9, "matmul_share": 0.25}
    return conclude(
        [
            Bound(name, figures[name], least, at_most=False)
            for name, least in bounds.items()
            if name in figures
        ],
        {"figures": figures},
    )


@dataclass
class Bench:
    """The starter, its training rows, and what its sub-networks are scored on."""

    panel_size: int
    rows: int

    def __post_init__(self) -> None:
        self.source = models.resolve("starter")
        tokenizer = models.load(self.source).tokenizer
        alpaca = load_training_data(str(DATA / "alpaca" / "train.jsonl"), tokenizer, 256)
        gsm8k = load_training_data(str(DATA / "gsm8k" / "train.jsonl"), tokenizer, 256)
        train, self.held_out = alpaca.split(self.rows)
        self.train = Examples(torch.cat([train.ids, gsm8k.ids]), torch.cat([train.labels, gsm8k.labels]))
        wikitext = load_training_data(str(next((DATA / "wikitext2").glob("*valid*"))), tokenizer, 256)
        self.wikitext = Examples(wikitext.ids[: self.rows], wikitext.labels[: self.rows])

    def orderings(self) -> dict[str, float]:
        """Mean loss of the panel under each ordering, nothing tuned."""
        print(f"{'neurons':<12}{'layers':<18}{'alpaca':>8}{'wikitext2':>11}   nats a token, untuned panel")
        for neurons, layers in ORDERINGS:
            elastic, space = self._sorted(neurons, layers)
            panel = self._panel(space)
            alpaca = self._mean_loss(elastic, panel, self.held_out)
            wikitext = self._mean_loss(elastic, panel, self.wikitext)
            print(f"{neurons:<12}{layers:<18}{alpaca:>8.3f}{wikitext:>11.3f}", flush=True)
        return {}

    def tuning(self, minutes: float) -> dict[str, float]:
        """The default recipe, then the same number of steps under two others."""
        head = ("recipe", "panel before", "after", "full before", "after", "wikitext2 after")
        print(("{:<26}" + "{:>14}" * 5).format(*head))
        default, steps = self._tuned(
            "default", ("rms", "greedy"), FinetuneConfig(steps=10**6, minutes=minutes)
        )
        paper, _ = self._tuned("paper ordering", ("paper", "paper"), FinetuneConfig(steps=steps))
        plain = FinetuneConfig(steps=steps, loss="cross-entropy", super_every=1)
        full, _ = self._tuned("full model only", ("rms", "greedy"), plain)
        return {
            "steps": steps,
            "panel_gain_nat": default["panel_before"] - default["panel_after"],
            "full_gain_nat": default["full_before"] - default["full_after"] + 0.005,
            "over_paper_nat": paper["panel_after"] - default["panel_after"],
            "over_full_only_nat": full["panel_after"] - default["panel_after"],
        }

    def speed(self) -> dict[str, float]:
        """Tokens a second of our steps and of transformers' Trainer, same model, data and batch."""
        elastic, space = self._sorted("paper", "paper")
        config = FinetuneConfig(steps=6, loss="cross-entropy", super_every=1, train_embeddings=True)
        super_rate = self._rate(elastic, space, config)
        super_memory = peak_memory_gib()
        small = SearchSpace(space.shape, (22,), (768,), space.drop_order)
        sub_rate = self._rate(elastic, small, FinetuneConfig(steps=6, loss="cross-entropy", super_every=0))
        trainer_rate = self._trainer_rate()
        flops = 3 * flops_per_token(space.shape, space.full, 256)
        peak = matmul_peak()
        print(
            f"super-network steps {super_rate:.0f} tok/s (peak memory {super_memory:.1f} GiB), "
            f"smallest sub-network's {sub_rate:.0f}, Trainer's {trainer_rate:.0f}; "
            f"bf16 matmul peak {peak / 1e12:.2f} TFLOP/s"
        )
        return {
            "super_speed_ratio": super_rate / trainer_rate,
            "matmul_share": super_rate * flops / peak,
            "sub_over_super": sub_rate / super_rate,
        }

    def _sorted(self, neurons: Any, layers: Any) -> tuple[Elastic, SearchSpace]:
        model = models.load(self.source).model
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
        self, name: str, ordering: tuple[str, str], config: FinetuneConfig
    ) -> tuple[dict[str, float], int]:
        elastic, space = self._sorted(*ordering)
        panel = self._panel(space)
        found = {
            "panel_before": self._mean_loss(elastic, panel, self.held_out),
            "full_before": self._mean_loss(elastic, [space.full], self.held_out),
        }
        curve: list[float] = []

        def listen(event: Any) -> None:
            if isinstance(event, LossReported):
                curve.append(event.loss)

        result = finetune(elastic, space, self._some(config), config, listen)
        found["panel_after"] = self._mean_loss(elastic, panel, self.held_out)
        found["full_after"] = self._mean_loss(elastic, [space.full], self.held_out)
        wikitext = self._mean_loss(elastic, panel, self.wikitext)
        order = ("panel_before", "panel_after", "full_before", "full_after")
        figures = [*(found[key] for key in order), wikitext]
        print(("{:<26}" + "{:>14.3f}" * 5).format(f"{name} ({result.steps} steps)", *figures), flush=True)
        stride = max(1, len(curve) // 10)
        print("  loss: " + " ".join(f"{loss:.3f}" for loss in curve[::stride]), flush=True)
        return found, result.steps

    def _some(self, config: FinetuneConfig) -> Examples:
        """As many rows as the time may use: the original reads all of them first."""
        wanted = min(len(self.train.ids), int(min(config.minutes * 100, config.steps * config.batch)))
        chosen = torch.randperm(len(self.train.ids), generator=torch.Generator().manual_seed(0))[:wanted]
        return Examples(self.train.ids[chosen], self.train.labels[chosen])

    def _rate(self, elastic: Elastic, space: SearchSpace, config: FinetuneConfig) -> float:
        times: list[float] = []
        rows = Examples(self.train.ids[:64], self.train.labels[:64])
        finetune(elastic, space, rows, config, lambda _: times.append(time.monotonic()))
        steps = times[1::2]  # each step reports its loss and its progress
        return config.batch * 256 * (len(steps) - 2) / (steps[-1] - steps[1])

    def _trainer_rate(self) -> float:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        times: list[float] = []

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.monotonic())

        model = models.load(self.source).model
        rows = [
            {"input_ids": ids, "labels": labels}
            for ids, labels in zip(self.train.ids, self.train.labels, strict=True)
        ]
        arguments = TrainingArguments(
            "/tmp/trainer",
            max_steps=6,
            per_device_train_batch_size=8,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        )
        Trainer(model, arguments, train_dataset=rows[:64], callbacks=[Clock()]).train()
        return 8 * 256 * (len(times) - 2) / (times[-1] - times[1])


def matmul_peak() -> float:
    """Floating-point operations a second of a large bf16 product on this machine."""
    left, right = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    left @ right
    started = time.monotonic()
    for _ in range(10):
        left @ right
    return 10 * 2 * 2048**3 / (time.monotonic() - started)


def peak_memory_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(main())
