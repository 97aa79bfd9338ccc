"""What a run was asked: flags become one typed value, stored in run.json and read back on resume."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.errors import InputError, RunConflictError
from compressor.presets import Effort, effort
from compressor.profile import Profile, load_profile
from compressor.runfolder import RUN_FILE, RunFolder
from compressor.supernet.config import Loss, Teacher
from compressor.supernet.rows import check_file
from compressor.supernet.subnet_sampling import Recipe, Sampling

Algorithm = Literal["linas", "published", "nsga2", "random"]
AGREEMENT = "agreement"
DEFAULT_PROFILE = "auto"
EFFORT_FLAGS = tuple(field.name for field in fields(Effort))
BUDGET_FLAGS = {"memory_budget": "memory_gib", "ttft_budget": "ttft_ms", "tpot_budget": "tpot_ms"}
WORKLOAD_FLAGS = ("prompt_tokens", "output_tokens", "concurrency")
PLAIN_FLAGS = (
    *("model", "num_fewshot", "limit", "train_data", "lora_rank", "threads", "seed", "cluster", "racing"),
)


class Tuning(BaseModel):
    """What was said of the fine-tuning by ``--tuning-…``; the rest is as the data asks. Names and meanings
    are those of ``FinetuneConfig``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe: Recipe | None = None
    super_every: int | None = Field(default=None, ge=0)
    sampling: Sampling | None = None
    loss: Loss | None = None
    teacher: Teacher | None = None
    temperature: float | None = Field(default=None, gt=0)
    alpha: float | None = Field(default=None, ge=0)
    gamma: float | None = Field(default=None, ge=0)
    lr: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _weighs_something(self) -> Tuning:
        if self.alpha == 0 and self.gamma == 0:
            raise ValueError("--tuning-alpha and --tuning-gamma are both 0: give one of them above it")
        return self

    @property
    def told(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


TUNING_FLAGS = {f"tuning_{name}": name for name in Tuning.model_fields}


class RunRequest(BaseModel):
    """Everything that decides a run's result."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = "starter"
    profile: Profile
    preset: str = "standard"
    effort: Effort
    tasks: tuple[str, ...] = (AGREEMENT,)
    task_data: str = ""
    num_fewshot: int | None = None
    limit: int | None = None
    train_data: str = ""
    lora_rank: int | None = None
    tuning: Tuning = Tuning()
    algorithm: Algorithm = "linas"
    threads: int | None = None
    seed: int = 0
    cluster: str = ""
    racing: bool | None = None

    @property
    def data_free(self) -> bool:
        """Whether the super-network is tuned on text that the unpruned model writes."""
        return not self.train_data

    @property
    def tuning_loss(self) -> Loss:
        """The divergence from the unpruned model on its own text, the labels on the user's, unless told."""
        return self.tuning.loss or ("distill" if self.data_free else "cross-entropy")

    @property
    def keeps_teacher(self) -> bool:
        """Whether what the unpruned model says of the training rows is kept while tuning."""
        return self.tuning_loss != "cross-entropy" and self.tuning.teacher != "super"

    @property
    def races(self) -> bool:
        """Whether scoring stops early for dominated sub-networks: unless told, in quick runs on tasks.

        The paper's tasks are scored in full, and agreement has too few sequences for a race to end early.
        """
        if self.racing is not None:
            return self.racing
        return self.preset == "quick" and not self.scores_agreement and "paper" not in self.tasks

    @property
    def scores_agreement(self) -> bool:
        """Whether accuracy is agreement with the unpruned model rather than lm-eval tasks."""
        return self.tasks == (AGREEMENT,)


def understand(asked: Mapping[str, Any], run: Path | None, resume: bool) -> tuple[Path, RunRequest]:
    """The run folder's path and what is asked of it, from flags and, on resume, from its ``run.json``.

    Writes nothing. Raises ``InputError`` or ``RunConflictError``.
    """
    if run is not None and (run / RUN_FILE).exists():
        return run, on_top_of(run, asked, resume)
    request = fresh(asked)
    path = run or Path("runs") / default_name(request)
    if (path / RUN_FILE).exists():
        return path, on_top_of(path, asked, resume)
    return path, request


def on_top_of(path: Path, asked: Mapping[str, Any], resume: bool) -> RunRequest:
    """What is asked of a run that exists already."""
    if not resume:
        raise RunConflictError(
            f"{path} holds a run already: add --resume to go on, or name another folder with --run"
        )
    return updated(stored_request(RunFolder.open_existing(path)), asked, path)


def stored_request(folder: RunFolder) -> RunRequest:
    """The request in a run folder's ``run.json``. Raises ``RunConflictError`` if it is damaged."""
    try:
        return RunRequest.model_validate(folder.request())
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise RunConflictError(
            f"{folder.run_file} is damaged at {where}: restore it, or start a new run folder"
        ) from None


def fresh(asked: Mapping[str, Any]) -> RunRequest:
    """A request from flags alone."""
    profile = named_profile(str(asked.get("profile", DEFAULT_PROFILE)))
    preset = str(asked.get("preset", "standard"))
    base = RunRequest(profile=profile, preset=preset, effort=effort(preset))
    return with_flags(base, asked)


def check_inputs(request: RunRequest) -> None:
    """Raise ``InputError`` for a model or data of the user's that the run would fail on later."""
    from compressor import models

    source = models.resolve(request.model)
    models.check_engine(source.name, models.read_shape(source), request.profile.engine)
    if request.train_data:
        check_file(request.train_data)


def updated(stored: RunRequest, asked: Mapping[str, Any], run: Path) -> RunRequest:
    """The stored request with the given flags changed; another model is another run."""
    model = asked.get("model", stored.model)
    if model != stored.model:
        raise RunConflictError(
            f"{run} is a run of model '{stored.model}', not '{model}': name another folder with --run"
        )
    changes: dict[str, Any] = {}
    if "profile" in asked:
        changes["profile"] = named_profile(str(asked["profile"]))
    if "preset" in asked and asked["preset"] != stored.preset:
        changes |= {"preset": asked["preset"], "effort": effort(str(asked["preset"]))}
    return with_flags(stored.model_copy(update=changes), asked)


def with_flags(base: RunRequest, asked: Mapping[str, Any]) -> RunRequest:
    """``base`` with every flag but profile and preset applied. Raises ``InputError``."""
    changes: dict[str, Any] = {name: asked[name] for name in PLAIN_FLAGS if name in asked}
    if "tasks" in asked:
        changes["tasks"] = tuple(t.strip() for t in str(asked["tasks"]).split(",") if t.strip())
    if "task_data" in asked:
        changes["task_data"] = str(asked["task_data"])
    if "algorithm" in asked:
        if asked["algorithm"] not in get_args(Algorithm):
            raise InputError(
                f"unknown algorithm '{asked['algorithm']}': use one of {', '.join(get_args(Algorithm))}"
            )
        changes["algorithm"] = asked["algorithm"]
    for name, least in (("num_fewshot", 0), ("limit", 1), ("threads", 1), ("lora_rank", 0)):
        if name in changes and changes[name] < least:
            raise InputError(f"--{name.replace('_', '-')} must be positive (got {changes[name]})")
    if AGREEMENT in changes.get("tasks", ()) and len(changes["tasks"]) > 1:
        raise InputError("--tasks agreement stands alone: drop it, or drop the lm-eval tasks")
    told = {name: asked[flag] for flag, name in TUNING_FLAGS.items() if flag in asked}
    if told:
        changes["tuning"] = _tuning({**base.tuning.told, **told})
    spent = {name: asked[name] for name in EFFORT_FLAGS if name in asked}
    if spent:
        kept = {name: getattr(base.effort, name) for name in EFFORT_FLAGS}
        changes["effort"] = effort(base.preset, **{**kept, **spent})
    budgets = {field: asked[flag] for flag, field in BUDGET_FLAGS.items() if flag in asked}
    workload = {name: asked[name] for name in WORKLOAD_FLAGS if name in asked}
    if budgets or workload:
        changes["profile"] = base.profile.with_overrides(**budgets).with_workload(**workload)
    return base.model_copy(update=changes)


def _tuning(told: Mapping[str, Any]) -> Tuning:
    try:
        return Tuning.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise InputError(first["msg"].removeprefix("Value error, ")) from None
        flag = f"--tuning-{str(first['loc'][0]).replace('_', '-')}"
        raise InputError(f"{flag}: {first['msg'].lower()} (got {first['input']})") from None


def named_profile(name: str) -> Profile:
    """The profile of that name or file, or the one that fits this machine best for ``auto``."""
    if name != "auto":
        return load_profile(name)
    from compressor import device

    return device.auto(device.detect())


def default_name(request: RunRequest) -> str:
    """Folder name of a run that was given none."""
    model = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(request.model).name).strip("-") or "model"
    return f"{model}-{request.profile.name}"
