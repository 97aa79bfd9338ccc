"""/v1/responses through the official client: functions, their results, formats, the stream's events."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall

from tests.serve.conftest import MODEL_NAME, RunningServer
from tests.serve.test_operation import post

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}},
    "required": ["name"],
    "additionalProperties": False,
}
FORCED = [{"type": "function", "name": "weather"}, "required"]


@pytest.fixture(params=["server", "tools_server"])
def client(request) -> openai.OpenAI:
    """Of a model whose chat template has no tools, and of one whose has."""
    server: RunningServer = request.getfixturevalue(request.param)
    return server.client()


def ask(client: openai.OpenAI, **fields):
    return client.responses.create(
        **({"model": MODEL_NAME, "input": "How is the weather?", "max_output_tokens": 90} | fields)
    )


@pytest.mark.parametrize("choice", FORCED, ids=["named", "required"])
def test_a_function_that_must_be_called_is_called_by_its_schema(client, choice):
    reply = ask(client, tools=[WEATHER], tool_choice=choice)
    (call,) = reply.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, call.status, reply.status) == ("weather", "completed", "completed")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    assert reply.tools[0].name == "weather"
    assert reply.output_text == ""


def test_the_call_is_streamed_as_events(client):
    given = {"model": MODEL_NAME, "input": "a", "tools": [WEATHER], "tool_choice": "required"}
    with client.responses.stream(**given) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(7))
    assert events[3].delta == events[4].arguments == final.output[0].arguments


def test_text_is_streamed_as_events(client):
    with client.responses.stream(model=MODEL_NAME, input="a", max_output_tokens=5) as stream:
        kinds = [event.type for event in stream]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_what_a_function_gave_goes_back_to_the_model(client):
    call = ask(client, tools=[WEATHER], tool_choice="required").output[0]
    turns = [
        {"role": "user", "content": "How is the weather?"},
        {"type": "reasoning", "id": "r1", "summary": []},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    reply = ask(client, input=turns, tools=[WEATHER], max_output_tokens=4)
    assert reply.usage.output_tokens == 4


def test_several_calls_in_a_row_are_one_turn(client):
    calls = [
        {"type": "function_call", "call_id": name, "name": "weather", "arguments": text}
        for name, text in (("a", '{"city": "Oslo"}'), ("b", ""))
    ]
    results = [
        {"type": "function_call_output", "call_id": "a", "output": "rain"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "sun"}]},
    ]
    turns = [{"role": "user", "content": "a"}, *calls, *results]
    assert 1 <= ask(client, input=turns, max_output_tokens=2).usage.output_tokens <= 2


@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
def test_text_is_held_to_its_format(client, kind):
    form = {"type": kind, "name": "person", "schema": PERSON, "strict": True}
    reply = ask(client, text={"format": form})
    assert json.loads(reply.output_text)["name"] in ("Ann", "Bob")
    assert reply.text.format.type == kind


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"previous_response_id": "resp_1"}, "'previous_response_id' is not supported"),
        ({"background": True}, "'background' is not supported"),
        ({"reasoning": {"effort": "high"}}, "'reasoning' is not supported"),
        ({"conversation": "c"}, "'conversation' is not supported"),
        ({"truncation": "auto"}, "'truncation' is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "function", "name": "stocks"}, "tools": [WEATHER]}, "not among tools"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "needs a schema"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "type 'input_image'"),
        ({"input": []}, "input"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_done_is_refused_by_name(server, fields, words):
    status, answer = post(server, "/v1/responses", json.dumps({"input": "a"} | fields).encode())
    assert status == 400
    assert words in answer["error"]["message"]


def test_what_changes_nothing_is_taken(client):
    plain = ("store", "metadata", "user", "include", "truncation", "service_tier", "parallel_tool_calls")
    values = (False, {"a": "b"}, "me", [], "disabled", "auto", True)
    fields = dict(zip(plain, values, strict=True))
    assert ask(client, max_output_tokens=1, **fields).status == "incomplete"
