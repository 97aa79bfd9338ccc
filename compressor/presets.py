"""How much effort a run spends: the presets of the command line and the wizard."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from compressor.errors import InputError


@dataclass(frozen=True)
class Effort:
    """What a run may spend. Every field is also a flag of ``compress``."""

    evaluations: int
    """Sub-networks evaluated and measured for real."""
    tuning_minutes: float
    """Longest time of the super-network's fine-tuning, minutes."""
    tuning_steps: int
    """Steps of the fine-tuning, fewer if its minutes are over first."""
    tuning_batch: int
    """Sequences of each of those steps."""
    text_sequences: int
    """Sequences that the unpruned model writes for calibration and data-free tuning."""
    score_sequences: int
    """Sequences that agreement is scored on, half in the search split, half for the report."""
    sequence_length: int
    """Tokens of each of those sequences."""
    bench_seconds: float
    """Longest time to measure one candidate during the search, seconds."""
    winner_minutes: float = 0.0
    """Longest time of the winner's own fine-tuning, minutes; 0 for none."""

    def __post_init__(self) -> None:
        """Make every number what it is after it was stored: 5 and 5.0 minutes would be two tunings."""
        for field in fields(self):
            kind = float if field.type == "float" else int
            object.__setattr__(self, field.name, kind(getattr(self, field.name)))


MAY_BE_NONE = ("winner_minutes",)

PRESETS = {
    "quick": Effort(
        evaluations=28,
        tuning_minutes=3,
        tuning_steps=480,
        tuning_batch=4,
        text_sequences=320,
        score_sequences=64,
        sequence_length=160,
        bench_seconds=2.0,
        winner_minutes=5,
    ),
    "standard": Effort(
        evaluations=120,
        tuning_minutes=30,
        tuning_steps=4000,
        tuning_batch=8,
        text_sequences=2048,
        score_sequences=128,
        sequence_length=256,
        bench_seconds=4.0,
        winner_minutes=30,
    ),
    "paper": Effort(
        evaluations=250,
        tuning_minutes=60 * 24 * 7,
        tuning_steps=20000,
        tuning_batch=16,
        text_sequences=4096,
        score_sequences=128,
        sequence_length=512,
        bench_seconds=10.0,
        winner_minutes=60 * 24,
    ),
}


def effort(preset: str, **overrides: float | None) -> Effort:
    """The preset's effort with single fields replaced. Raises ``InputError``."""
    if preset not in PRESETS:
        raise InputError(f"unknown preset '{preset}': use one of {', '.join(PRESETS)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        if value < 0 or (value == 0 and name not in MAY_BE_NONE):
            raise InputError(f"--{name.replace('_', '-')} must be above 0 (got {value})")
    return replace(PRESETS[preset], **given)  # type: ignore[arg-type]
