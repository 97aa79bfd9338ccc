"""A hardware profile: a target device with its budgets, workload, engine and search space."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import InputError

EngineName = Literal["onnxruntime", "vllm"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Device(_Table):
    """What machine the profile is for, and how to recognise it."""

    kind: Literal["cpu", "cuda"]
    match: list[str] = Field(
        default=[], description="Parts of the device's name, any of which fits; empty: any device of the kind"
    )
    memory_gib: Positive = Field(description="Memory of the device, GiB")
    description: str = ""
    source: str = Field(default="", description="Where the device's public figures come from")


class Budgets(_Table):
    """Hard limits on what is packaged, at the profile's workload."""

    memory_gib: Positive = Field(description="Weights + KV cache + activations, GiB")
    ttft_ms: Positive = Field(description="Time to first token, median, ms")
    tpot_ms: Positive = Field(description="Time per output token, median, ms")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)


class Workload(_Table):
    """What is served: every request has so many tokens, so many requests run at once."""

    prompt_tokens: Annotated[int, Field(gt=0)]
    output_tokens: Annotated[int, Field(gt=0)]
    concurrency: Annotated[int, Field(gt=0)] = 1

    @property
    def label(self) -> str:
        """Key of the workload in the ledger: prompt+output tokens x concurrent requests."""
        return f"{self.prompt_tokens}+{self.output_tokens}x{self.concurrency}"


class Space(_Table):
    """Default search space, as fractions of the model's own depth and MLP width."""

    depth_fractions: list[Fraction] = Field(default=[0.75, 0.875, 1.0], min_length=1)
    width_fractions: list[Fraction] = Field(default=[0.5, 1.0], min_length=1)
    bits: list[Literal[4, 8]] = Field(default=[8], min_length=1)


class Profile(_Table):
    """One TOML file of ``profiles/``, typed."""

    name: str
    summary: str = ""
    device: Device
    budgets: Budgets
    workload: Workload
    engine: EngineName = "onnxruntime"
    numerics: Literal["int8", "int4"] = "int8"
    space: Space = Space()

    def with_overrides(self, **budgets: float | None) -> Profile:
        """The profile with single budgets replaced (``memory_gib``, ``ttft_ms``, ``tpot_ms``)."""
        given = {name: value for name, value in budgets.items() if value is not None}
        return _validated(
            {**self.model_dump(), "budgets": {**self.budgets.model_dump(), **given}}, "budget flags"
        )


def profile_names() -> list[str]:
    """Names of the profiles that come with the program."""
    return sorted(entry.name[:-5] for entry in files("profiles").iterdir() if entry.name.endswith(".toml"))


def load_profile(name_or_path: str) -> Profile:
    """The profile of that name, or in that TOML file. Raises ``InputError``."""
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"no profile file {path}: give a TOML file or a name of `compress profiles`")
        return parse_profile(path.read_text(encoding="utf-8"), str(path))
    names = profile_names()
    if name_or_path not in names:
        near = get_close_matches(name_or_path, names, 3) or names
        raise InputError(
            f"unknown profile '{name_or_path}': did you mean {', '.join(near)}? `compress profiles` lists them"
        )
    text = files("profiles").joinpath(f"{name_or_path}.toml").read_text(encoding="utf-8")
    return parse_profile(text, f"profile '{name_or_path}'")


def parse_profile(text: str, where: str) -> Profile:
    """A profile from TOML text; ``where`` names the source in errors."""
    try:
        return _validated(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where} is not valid TOML: {error}") from error


def _validated(data: Mapping[str, Any], where: str) -> Profile:
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {field}: {first['msg'].lower()} (got {first.get('input')!r})") from None
