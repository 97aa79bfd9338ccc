"""/v1/models, /tokenize and /detokenize: what is served, and how it reads text."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from serve.body import body_of, post
from serve.errors import bad_request
from serve.prompts import chat_prompt
from serve.reply import json_reply
from serve.requests import check_model
from serve.schemas import DetokenizeBody, TokenizeBody
from serve.service import Service

MAX_TOKENS_SHOWN = 250_000


def info_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The one model served."""
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """The model by name."""
        check_model(service, name)
        return _model(service)

    @post(router, "/tokenize", TokenizeBody)
    async def tokenize(body: TokenizeBody = body_of(TokenizeBody, service.reading)) -> Response:
        """Token ids of text, or of messages through the chat template."""
        check_model(service, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give either prompt or messages", "prompt")
        if body.messages is not None:
            tokens = await chat_prompt(service, body.messages)
        else:
            special = body.add_special_tokens is not False
            tokens = await service.encode(body.prompt or "", special, "prompt", MAX_TOKENS_SHOWN)
        return await json_reply({"tokens": tokens, "count": len(tokens), "max_model_len": service.context})

    @post(router, "/detokenize", DetokenizeBody)
    async def detokenize(body: DetokenizeBody = body_of(DetokenizeBody, service.reading)) -> Response:
        """Text of token ids."""
        check_model(service, body.model)
        if body.tokens and max(body.tokens) >= service.model.vocabulary:
            raise bad_request(f"token ids must be below {service.model.vocabulary}", "tokens")
        return await json_reply({"prompt": await service.decode(body.tokens, skip_special_tokens=False)})

    return router


def _model(service: Service) -> dict[str, Any]:
    manifest = service.package.manifest
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "edge-compressor",
        "max_model_len": service.context,
        "base_model": manifest.base_model,
        "parameters": manifest.parameters,
        "numerics": manifest.numerics,
        "kv_cache": service.model.cache.shape.numerics,
    }
