"""A hardware profile: a target device with its budgets, workload, engine and search space."""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.errors import InputError
from compressor.manifest import CacheNumerics
from compressor.space import Numerics

EngineName = Literal["onnxruntime", "vllm"]
DeviceKind = Literal["cpu", "cuda"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class _Table(BaseModel):
    """A TOML table: values keep the type they were written with, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Device(_Table):
    """What machine the profile is for, and how to recognise it."""

    kind: DeviceKind
    match: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="Words of the device's name, any of which fits; empty: any device of the kind",
    )
    memory_gib: Positive = Field(description="Memory of the device, GiB, as it is sold")
    memory_bandwidth_gb_s: Positive | None = Field(
        default=None, description="Peak memory bandwidth, GB/s (10^9 bytes a second)"
    )
    matrix_tflops: Positive | None = Field(
        default=None, description="Advertised dense bf16 (fp16 without it) matrix operations, 10^12/s"
    )
    compute_capability: str = Field(
        default="", pattern=r"^(\d+\.\d)?$", description="Of a CUDA device, as 8.0: what kernels it has"
    )
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

    prompt_tokens: Count
    output_tokens: Count
    concurrency: Count = 1
    kv_cache: CacheNumerics = Field(
        default="fp32",
        description="How ONNX Runtime keeps the requests' keys and values; vLLM has its own way",
    )

    @property
    def label(self) -> str:
        """As tables say it: prompt+output tokens x concurrent requests."""
        return f"{self.prompt_tokens}+{self.output_tokens}x{self.concurrency}"

    @property
    def key(self) -> str:
        """Of what was measured with it, in the ledger."""
        return f"{self.label}/{self.cache_key}" if self.cache_key else self.label

    @property
    def cache_key(self) -> str:
        """Of what depends on how keys and values are kept and on nothing else of it, in the ledger."""
        return "" if self.kv_cache == "fp32" else f"kv-{self.kv_cache}"


class Space(_Table):
    """Default search space, as fractions of the model's own depth and MLP width."""

    depth_fractions: list[Fraction] = Field(default=[0.75, 0.875, 1.0], min_length=1)
    width_fractions: list[Fraction] = Field(default=[0.5, 1.0], min_length=1)
    bits: list[Literal[4, 8]] | None = Field(default=None, min_length=1)  # default: those of the numerics
    outer_bits: list[Literal[4, 8]] | None = Field(default=None, min_length=1)  # default: those of the layers


class Profile(_Table):
    """One TOML file of ``profiles/``, typed."""

    name: str = Field(min_length=1, pattern=r"^\w[\w.-]*$")
    summary: str = ""
    device: Device
    budgets: Budgets
    workload: Workload
    engine: EngineName = "onnxruntime"
    numerics: Literal["int8", "int4", "fp8"] = "int8"
    space: Space = Space()

    @model_validator(mode="after")
    def _budget_within_device(self) -> Profile:
        if self.budgets.memory_gib > self.device.memory_gib:
            raise ValueError(
                f"budgets.memory_gib ({self.budgets.memory_gib:g}) is more than the device has "
                f"(device.memory_gib = {self.device.memory_gib:g}): lower it"
            )
        return self

    @model_validator(mode="after")
    def _cache_of_the_engine(self) -> Profile:
        if self.engine == "vllm" and self.workload.kv_cache != "fp32":
            raise ValueError(
                "workload.kv_cache is for ONNX Runtime, vLLM keeps its cache its own way: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _kernels_of_the_device(self) -> Profile:
        if self.numerics == "fp8" and self.engine != "vllm":
            raise ValueError('numerics = "fp8" is vLLM\'s: set engine = "vllm"')
        if self.numerics == "fp8" and set(self.layer_bits) != {8}:
            raise ValueError('numerics = "fp8" has every layer in 8 bits: leave space.bits out')
        if reason := lacking_kernels(self.numerics, self.device.compute_capability):
            raise ValueError(f'numerics = "{self.numerics}": {reason}')
        return self

    @model_validator(mode="after")
    def _one_number_of_bits_in_int4(self) -> Profile:
        for name, asked in (("bits", self.space.bits), ("outer_bits", self.space.outer_bits)):
            if self.numerics == "int4" and asked and set(asked) != {4}:
                raise ValueError(
                    f'numerics = "int4" has every matrix in 4 bits, space.{name} asks for {asked}: '
                    f'leave space.{name} out, or set numerics = "int8"'
                )
        return self

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """That a layer's weights may have, once quantized."""
        return tuple(self.space.bits or [4 if self.numerics == "int4" else 8])

    @property
    def outer_bits(self) -> tuple[int, ...]:
        """That the embeddings and the head may have, once quantized; vLLM keeps them in bf16."""
        if self.engine == "vllm":
            return (8,)
        return tuple(self.space.outer_bits or self.layer_bits)

    def with_overrides(self, **budgets: float | None) -> Profile:
        """The profile with single budgets replaced (``memory_gib``, ``ttft_ms``, ``tpot_ms``).

        None keeps the profile's own. Raises ``InputError`` on a budget that is no budget.
        """
        given = {name: value for name, value in budgets.items() if value is not None}
        changed = {**self.model_dump(), "budgets": {**self.budgets.model_dump(), **given}}
        return _validated(changed, f"profile '{self.name}' with the budgets given")

    def with_workload(self, **counts: int | None) -> Profile:
        """The profile with single counts of its workload replaced; None keeps the profile's own.

        Raises ``InputError`` on a count that is no count.
        """
        given = {name: value for name, value in counts.items() if value is not None}
        changed = {**self.model_dump(), "workload": {**self.workload.model_dump(), **given}}
        return _validated(changed, f"profile '{self.name}' with the workload given")


def lacking_kernels(numerics: Numerics, compute_capability: str) -> str:
    """Why vLLM has no kernels for these numerics on a GPU of that compute capability; nothing where it has,
    or where the capability is not known. vLLM 0.32: CUTLASS's INT8 ends with 9.x, its FP8 begins with 8.9.
    """
    if not compute_capability:
        return ""
    level = float(compute_capability)
    if numerics == "int8" and level >= 10:
        return f"vLLM has no INT8 kernels for compute capability {compute_capability}: set fp8"
    if numerics == "fp8" and level < 8.9:
        return (
            f"a GPU of compute capability {compute_capability} has no FP8 units, 8.9 is the first: set int8"
        )
    return ""


def profile_names() -> list[str]:
    """Names of the profiles that come with the program."""
    return sorted(entry.name[:-5] for entry in files("profiles").iterdir() if entry.name.endswith(".toml"))


def load_profile(name_or_path: str) -> Profile:
    """The profile of that name (case does not matter), or in that TOML file. Raises ``InputError``."""
    if _is_path(name_or_path):
        return parse_profile(_read(Path(name_or_path)), name_or_path)
    return parse_profile(profile_text(name_or_path), f"profile '{name_or_path}'")


def load_profiles() -> list[Profile]:
    """All profiles that come with the program."""
    return [load_profile(name) for name in profile_names()]


def profile_text(name_or_path: str) -> str:
    """The commented TOML of a profile, to show or to copy. Raises ``InputError``."""
    if _is_path(name_or_path):
        return _read(Path(name_or_path))
    names = profile_names()
    name = name_or_path.lower()
    if name not in names:
        near = get_close_matches(name, names, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it is one of {', '.join(names)}"
        raise InputError(f"unknown profile '{name_or_path}': {hint} (a path to a TOML file works too)")
    return files("profiles").joinpath(f"{name}.toml").read_text(encoding="utf-8")


def parse_profile(text: str, where: str) -> Profile:
    """A profile from TOML text; ``where`` names the source in errors. Raises ``InputError``."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply to be a profile") from error
    return _validated(data, where)


def _is_path(name_or_path: str) -> bool:
    return name_or_path.lower().endswith(".toml") or "/" in name_or_path or "\\" in name_or_path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"no profile file {path}: give a TOML file or a name of `compress profiles`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"profile file {path} cannot be read: {reason}") from error


def _validated(data: Mapping[str, Any], where: str) -> Profile:
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(error, where)) from None


def _explain(error: ValidationError, where: str) -> str:
    """One line about the first fault: the source, the field, what is wrong and what would be right."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where}: {field} is missing: add it (`compress profiles show starter-cpu` has an example)"
    if first["type"] == "extra_forbidden":
        return f"{where}: {field} is not a key of profiles: {_known_keys(first['loc'])}"
    if not field:
        return f"{where}: {message}"
    return f"{where}: {field}: {message[0].lower()}{message[1:]} (got {reprlib.repr(first.get('input'))})"


def _known_keys(location: tuple[int | str, ...]) -> str:
    table: type[BaseModel] = Profile
    for part in location[:-1]:
        annotation = table.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        table = annotation
    near = get_close_matches(str(location[-1]), list(table.model_fields), 1)
    return f"did you mean {near[0]}?" if near else f"remove it or use one of {', '.join(table.model_fields)}"
