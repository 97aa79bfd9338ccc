"""Tools through the official client, on a package whose chat template has them."""

from __future__ import annotations

import json

import openai
import pytest

from tests.serve.conftest import MODEL_NAME, RunningServer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
QUESTION = [{"role": "user", "content": "How is the weather in Oslo?"}]


@pytest.fixture
def client(tools_server: RunningServer) -> openai.OpenAI:
    return tools_server.client()


def ask(client: openai.OpenAI, **options):
    settings = {"model": MODEL_NAME, "messages": QUESTION, "tools": [WEATHER], "max_tokens": 120}
    return client.chat.completions.create(**(settings | options))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_made_by_the_schema(client, choice):
    reply = ask(client, tool_choice=choice).choices[0]
    assert reply.finish_reason == "tool_calls"
    (call,) = reply.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    assert reply.message.content is None


def test_calls_are_streamed(client):
    chunks = [chunk.choices[0] for chunk in ask(client, tool_choice="required", stream=True)]
    (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert call.function.name == "weather"
    assert chunks[-1].finish_reason == "tool_calls"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""


def test_the_result_of_a_call_goes_back_to_the_model(client):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    assert ask(client, messages=messages, max_tokens=4).usage.completion_tokens == 4


def test_tools_may_be_left_alone_and_must_exist(client):
    reply = ask(client, tool_choice="none", max_tokens=4).choices[0]
    assert reply.message.tool_calls is None and reply.finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="not among tools"):
        ask(client, tool_choice={"type": "function", "function": {"name": "stocks"}})
