"""From checked bodies to generation requests: what all endpoints share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from serve.errors import ApiError, bad_request
from serve.sampling import SamplingParams
from serve.schemas import SamplingFields
from serve.sequence import Finished, GenerationRequest
from serve.service import Service


def check_model(service: Service, name: str | None) -> None:
    """Raises ``ApiError`` 404 for a model that isn't served."""
    if name is not None and name != service.name:
        raise ApiError(
            404,
            f"the model '{name[:100]}' is not served here: ask for '{service.name}'",
            code="model_not_found",
            param="model",
        )


def sampling_params(body: SamplingFields, vocabulary: int) -> SamplingParams:
    """OpenAI's defaults where the body is silent."""
    return SamplingParams(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=_or(body.min_p, 0.0),
        seed=None if body.seed is None else abs(body.seed) * 2 + (body.seed < 0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        logit_bias=_logit_bias(body.logit_bias, vocabulary),
    )


def end_tokens(service: Service, body: SamplingFields) -> frozenset[int]:
    """The tokens that end the text: the model's and those asked for."""
    own = frozenset() if body.ignore_eos else service.package.eos_tokens
    return own | frozenset(body.stop_token_ids or ())


def repeat(request: GenerationRequest, times: int) -> list[GenerationRequest]:
    """``times`` choices of one request; with a seed, each has its own."""
    seed = request.sampling.seed
    return [
        request
        if seed is None
        else replace(request, sampling=replace(request.sampling, seed=seed + 2 * index))
        for index in range(times)
    ]


def check_choices(service: Service, count: int, param: str) -> None:
    """Raises ``ApiError`` if so many sequences could never be queued at once."""
    limit = service.settings.sequences + service.settings.queue_size
    if count > limit:
        raise bad_request(f"{count} sequences in one request are more than the {limit} allowed", param)


def usage_of(ends: Sequence[Finished], choices_per_prompt: int) -> dict[str, Any]:
    """Token counts; a prompt with several choices counts once."""
    prompts = ends[::choices_per_prompt]
    prompt_tokens = sum(end.prompt_tokens for end in prompts)
    output_tokens = sum(end.output_tokens for end in ends)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in prompts)},
    }


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _logit_bias(bias: dict[str, float] | None, vocabulary: int) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
            raise bad_request(f"logit_bias: '{key[:40]}' is no token id below {vocabulary}", "logit_bias")
        result[int(key)] = value
    return result


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
