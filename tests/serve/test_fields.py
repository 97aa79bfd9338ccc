"""The table of fields in docs/serving.md: complete as to OpenAI's client, and true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from serve.errors import ApiError
from serve.fields import check_unknown
from serve.schemas import ChatBody, CompletionBody, ResponsesBody

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
ENDPOINTS: dict[str, tuple[type[BaseModel], object]] = {
    "/v1/chat/completions": (ChatBody, chat_params.CompletionCreateParamsStreaming),
    "/v1/completions": (CompletionBody, completion_create_params.CompletionCreateParamsStreaming),
    "/v1/responses": (ResponsesBody, response_create_params.ResponseCreateParamsStreaming),
}


def rows(endpoint: str) -> dict[str, str]:
    """What the page says we do with each field."""
    part = PAGE.read_text(encoding="utf-8").split(f"### {endpoint}\n")[1].split("\n#")[0]
    found: dict[str, str] = {}
    for line in part.splitlines():
        if line.startswith("| `"):
            names, ours = line.split(" | ")[:2]
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), ours)
    return found


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_of_openais_client_is_there(endpoint):
    _, params = ENDPOINTS[endpoint]
    assert set(params.__annotations__) <= set(rows(endpoint))


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_it_says_of_us_is_true(endpoint):
    kind, _ = ENDPOINTS[endpoint]
    known = frozenset(field.alias or name for name, field in kind.model_fields.items())
    said = rows(endpoint)
    assert known <= set(said)
    for name, ours in said.items():
        assert (name in known) == (ours == "yes"), name
        taken = accepts({name: "something of weight"}, known)
        assert taken == (ours in ("yes", "taken, no effect")), name
        assert accepts({name: None}, known), name


def accepts(body: dict, known: frozenset[str]) -> bool:
    try:
        check_unknown(body, known)
    except ApiError as error:
        assert next(iter(body)) in error.message
        return False
    return True
