"""What the person has chosen so far: nothing but flags of the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compressor import request
from compressor.request import RunRequest


@dataclass(frozen=True)
class Choices:
    """Flags by their name in Python (``memory_budget``), and the run folder if one is named.

    ``stored`` is what an opened run was asked; flags then change it.
    """

    flags: Mapping[str, Any] = field(default_factory=lambda: {"model": "starter", "preset": "quick"})
    run: Path | None = None
    stored: RunRequest | None = None

    def but(self, **flags: Any) -> Choices:
        """These choices with flags replaced; None or an empty text takes a flag back."""
        merged = {**self.flags, **flags}
        return replace(self, flags={name: v for name, v in merged.items() if v not in (None, "")})

    def in_folder(self, run: Path | None) -> Choices:
        """These choices for another run folder, which then is a run of its own."""
        if run == self.run:
            return self
        return replace(self, run=run, flags={**self.known(), **self.flags}, stored=None)

    def value(self, name: str) -> Any:
        """What is asked under a flag's name; None where nothing is."""
        return {**self.known(), **self.flags}.get(name)

    def request(self) -> RunRequest:
        """What a run of these choices would be asked. Raises ``CompressorError``."""
        return self._request

    @cached_property
    def _request(self) -> RunRequest:
        if self.stored is None or self.run is None:
            return request.fresh(self.flags)
        return request.updated(self.stored, self.flags, self.run)

    @property
    def run_folder(self) -> Path:
        """The run folder named, or the one that the command line would take. Raises ``CompressorError``."""
        return self.run or Path("runs") / request.default_name(self.request())

    def arguments(self) -> list[str]:
        """The command line's arguments that ask for the same run; a run that exists goes on."""
        words = [
            word
            for name, value in self.flags.items()
            for word in (f"--{name.replace('_', '-')}", _text(value))
        ]
        return [*words, "--run", str(self.run_folder), "--resume"]

    def command_line(self) -> str:
        """The line that a person would type, to copy."""
        return shlex.join(["compress", *self.arguments()])

    def known(self) -> dict[str, Any]:
        """What the opened run was asked, by the names of flags."""
        if self.stored is None:
            return {}
        stored = self.stored
        asked = {
            "model": stored.model,
            "profile": stored.profile.name,
            "preset": stored.preset,
            "tasks": ",".join(stored.tasks),
            "task_data": stored.task_data,
            "train_data": stored.train_data,
            "lora_rank": stored.lora_rank,
            **{f"tuning_{name}": value for name, value in stored.tuning.told.items()},
            "num_fewshot": stored.num_fewshot,
            "limit": stored.limit,
            "evaluations": stored.effort.evaluations,
            "tuning_minutes": stored.effort.tuning_minutes,
        }
        return {name: value for name, value in asked.items() if value not in (None, "")}


def of_request(stored: RunRequest, run: Path) -> Choices:
    """The choices that go on with a run as it was asked."""
    return Choices({}, run, stored)


def _text(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)
