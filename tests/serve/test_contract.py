"""What the endpoint takes, does and refuses: fields, types, hosts, methods, encodings, versions of HTTP."""

from __future__ import annotations

import gzip
import http.client
import json

import openai
import pytest

from serve.settings import Settings
from tests.conftest import CHAT_TEMPLATE, make_tiny_model
from tests.serve.conftest import MODEL_NAME, TOOLS_TEMPLATE, RunningServer, whole_package
from tests.serve.test_operation import post, raw_request

MESSAGES = [{"role": "user", "content": "def make_tiny_model"}]
TOOL = {"type": "function", "function": {"name": "now"}}


def chat(server: RunningServer, **fields: object) -> tuple[int, dict]:
    body = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0} | fields
    return post(server, "/v1/chat/completions", json.dumps(body).encode())


def request(server: RunningServer, method: str, path: str, body: bytes | None = None, **headers: str):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    reply = connection.getresponse()
    return reply, reply.read()


NULL_OR_NOTHING = {
    "temperature": None, "top_p": None, "n": None, "seed": None, "stop": None, "stream": None, "tools": None,
    "stream_options": None, "logit_bias": None, "logprobs": None, "top_logprobs": None, "tool_choice": None,
    "response_format": None, "max_completion_tokens": None, "frequency_penalty": None, "user": None,
    "presence_penalty": None, "parallel_tool_calls": None, "ignore_eos": None, "reasoning_effort": None,
    "store": None, "metadata": None, "service_tier": None, "top_k": None, "min_p": None, "model": None,
    "modalities": None, "audio": None, "prediction": None, "functions": None, "function_call": None,
    "web_search_options": None, "verbosity": None, "chat_template_kwargs": None, "stop_token_ids": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NULL_OR_NOTHING)
def test_null_is_as_if_left_out(server, name):
    assert chat(server, **{name: None})[0] == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False, "top_logprobs": 0},
        {"top_logprobs": 0},
        {"logprobs": False},
        {"logprobs": True, "top_logprobs": 0},
        {"seed": 1.0},
        {"max_tokens": 4.0},
        {"tools": []},
        {"parallel_tool_calls": False},
        {"store": False, "metadata": {"a": "b"}, "user": "me", "service_tier": "auto"},
        {"response_format": {"type": "text"}},
        {"stream": False, "stream_options": None},
        {"stop": []},
        {"stop_token_ids": [7]},
        {"use_beam_search": False, "min_tokens": 0, "repetition_penalty": 1.0},
    ],
)
def test_what_changes_nothing_is_taken(server, fields):
    assert chat(server, **fields)[0] == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reasoning_effort": "high"}, "'reasoning_effort' is not supported"),
        ({"repetition_penalty": 1.2}, "'repetition_penalty' is not supported"),
        ({"min_tokens": 5}, "'min_tokens' is not supported"),
        ({"functions": [{"name": "f"}]}, "'functions' is not supported"),
        ({"modalities": ["audio"]}, "'modalities' is not supported"),
        ({"grammar": "root ::= x"}, "'grammar' is not supported"),
        ({"structured_outputs": {"regex": "x"}}, "'structured_outputs' is not supported"),
        ({"colour": "blue"}, "'colour' is not supported"),
        ({"stop": [""]}, "at most 16, each of 1 to 256 characters"),
        ({"stop": "x" * 257}, "at most 16, each of 1 to 256 characters"),
        ({"stop": ["x"] * 17}, "at most 16, each of 1 to 256 characters"),
        ({"stop": 7}, "at most 16, each of 1 to 256 characters"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "less than or equal to 20"),
        ({"seed": 1.5}, "seed"),
        ({"tool_choice": "sometimes"}, "'none', 'auto', 'required' or a function of tools"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"response_format": {"type": "json_schema"}}, "needs a schema"),
        ({"messages": [{"role": "user", "content": 7}]}, "text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url'"),
        ({"logit_bias": {str(token): 1 for token in range(2000)}}, "at most 1024 entries"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_done_is_refused_by_name(server, fields, words):
    status, answer = chat(server, **fields)
    assert status == 400
    assert words in answer["error"]["message"]


def test_json_object_with_a_schema_obeys_it(server):
    form = {"type": "json_object", "schema": {"enum": ["Ann", "Bob"]}}
    _, answer = chat(server, response_format=form, max_tokens=20)
    assert json.loads(answer["choices"][0]["message"]["content"]) in ("Ann", "Bob")


@pytest.mark.parametrize("arguments", ["", "  ", None, "{}", {}])
@pytest.mark.parametrize("which", ["server", "tools_server"])
def test_calls_with_empty_arguments_may_stand_in_the_history(request, which, arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    assert chat(request.getfixturevalue(which), messages=turns, tools=[TOOL])[0] == 200


@pytest.mark.parametrize("which", ["server", "tools_server"])
def test_a_forced_tool_without_parameters_is_called_with_none(request, which):
    status, answer = chat(request.getfixturevalue(which), tools=[TOOL], tool_choice="required", max_tokens=90)
    assert status == 200
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}


def test_tools_are_described_to_a_model_whose_template_has_none(server):
    """In words, in the system message; what a result says comes from the user."""
    weather = {"type": "function", "function": {"name": "weather", "description": "in a city"}}
    _, without = chat(server)
    _, with_tools = chat(server, tools=[weather])
    _, left_alone = chat(server, tools=[weather], tool_choice="none")
    tokens = [answer["usage"]["prompt_tokens"] for answer in (without, with_tools, left_alone)]
    assert tokens[1] > tokens[0] + 20
    assert tokens[2] == tokens[0]


def test_a_template_without_system_messages_gets_the_tools_from_the_user(changed_package, start_server):
    guard = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    server = start_server(changed_package(guard + CHAT_TEMPLATE))
    assert chat(server, tools=[TOOL], tool_choice="required", max_tokens=90)[0] == 200
    status, answer = chat(server, messages=[{"role": "system", "content": "a"}, *MESSAGES])
    assert (status, "no system" in answer["error"]["message"]) == (400, True)


GENERATION = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}", "{% generation %}{{ message['content'] }}{% endgeneration %}"
)
ESCAPED = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message | tojson(ensure_ascii=False) }}")


def prompt_of(server: RunningServer, **fields: object) -> str:
    """The conversation as the model reads it."""
    body = json.dumps({"messages": MESSAGES} | fields).encode()
    tokens = post(server, "/tokenize", body)[1]["tokens"]
    return post(server, "/detokenize", json.dumps({"tokens": tokens}).encode())[1]["prompt"]


def test_generation_marks_change_nothing(server, changed_package, start_server):
    assert prompt_of(start_server(changed_package(GENERATION))) == prompt_of(server)


def test_tojson_takes_its_arguments(changed_package, start_server):
    server = start_server(changed_package(ESCAPED))
    turns = [{"role": "user", "content": "é"}]
    assert '"é"' in prompt_of(server, messages=turns)
    assert chat(server, messages=turns, tools=[TOOL])[0] == 200


NAMED = {"additional_chat_templates/tool_use.jinja": TOOLS_TEMPLATE}


@pytest.mark.parametrize("how", ["folder", "list"])
def test_a_second_template_is_used_for_tools(changed_package, tiny_package, start_server, how):
    if how == "folder":
        package = changed_package(CHAT_TEMPLATE, NAMED)
    else:
        config = json.loads((tiny_package / "tokenizer_config.json").read_text())
        named = {"default": "not this one", "tool_use": TOOLS_TEMPLATE}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        package = changed_package(CHAT_TEMPLATE, {"tokenizer_config.json": json.dumps(config)})
    server = start_server(package)
    tokens = [chat(server, **fields)[1]["usage"]["prompt_tokens"] for fields in ({}, {"tools": [TOOL]})]
    assert prompt_of(server).startswith("<|im_start|>user")
    assert tokens[1] > tokens[0]
    assert chat(server, tools=[TOOL], tool_choice="required", max_tokens=90)[0] == 200


def test_a_vocabulary_larger_than_the_tokenizers_is_held_to_schemas(tmp_path, start_server):
    """As Qwen's: the logits have a place for tokens that no text has."""
    package = whole_package(make_tiny_model(tmp_path / "model", vocab_size=640), tmp_path, MODEL_NAME)
    server = start_server(package)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["Ann", "Bob"]}}}
    for fields in ({}, {"temperature": 1.5, "seed": 3}):
        status, answer = chat(server, response_format=form, max_tokens=20, **fields)
        assert status == 200
        assert json.loads(answer["choices"][0]["message"]["content"]) in ("Ann", "Bob")
    assert chat(server, temperature=2, max_tokens=60)[0] == 200


def test_variables_reach_the_template(changed_package, start_server):
    server = start_server(changed_package("{{ mood }}{{ messages[0].content }}"))
    status, answer = chat(server, chat_template_kwargs={"mood": "a merry mood"})
    assert status == 200
    assert answer["usage"]["prompt_tokens"] > chat(server)[1]["usage"]["prompt_tokens"]


def test_a_body_must_say_that_it_is_json(server):
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {"Content_Type": kind} if kind else {}
        reply, answer = request(server, "POST", "/v1/completions", body, **headers)
        assert reply.status == 415
        assert "Content-Type: application/json" in json.loads(answer)["error"]["message"]
    reply, _ = request(
        server, "POST", "/v1/completions", body, Content_Type="application/json; charset=utf-8"
    )
    assert reply.status == 200


def test_gzip_is_taken_and_other_encodings_are_refused_by_name(server):
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    zipped = gzip.compress(body)

    def answer_to(data: bytes, encoding: str) -> tuple[int, str]:
        headers = {"Content_Type": "application/json", "Content_Encoding": encoding}
        reply, answer = request(server, "POST", "/v1/completions", data, **headers)
        return reply.status, answer.decode()

    assert answer_to(zipped, "gzip")[0] == 200
    for encoding in ("br", "zstd", "deflate"):
        status, answer = answer_to(body, encoding)
        assert (status, f"'{encoding}'" in answer) == (415, True)
    for broken in (body, zipped[:-4], zipped[:-12], b""):
        assert answer_to(broken, "gzip")[0] == 400
    assert answer_to(gzip.compress(b" " * (64 << 20)), "gzip")[0] == 413


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1"])
def test_other_hosts_are_refused_on_a_loopback_server_without_a_key(server, host):
    reply, answer = request(server, "GET", "/v1/models", Host=host)
    assert (reply.status, "--allowed-host" in answer.decode()) == (403, True)


def test_our_own_hosts_and_those_allowed_are_answered(server, tiny_package, start_server):
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:9", "127.1.2.3", "[::1]:8000", "localhost."):
        assert request(server, "GET", "/v1/models", Host=host)[0].status == 200, host
    named = start_server(tiny_package, "--allowed-host", "Box.local", "--allowed-host", "other")
    for host, status in (("box.local:80", 200), ("other", 200), ("third", 403)):
        assert request(named, "GET", "/health", Host=host)[0].status == status, host


def test_with_a_key_or_in_public_any_host_may_be_named(tmp_path):
    assert Settings(tmp_path, api_key="k").answers_to("evil.example")
    assert Settings(tmp_path, host="0.0.0.0", insecure=True).answers_to("evil.example")
    assert not Settings(tmp_path).answers_to("")


def test_methods_that_are_not_allowed_say_which_are(server):
    for method, path, allowed in (
        ("GET", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/health", "GET, HEAD"),
    ):
        reply, _ = request(server, method, path)
        assert (reply.status, reply.getheader("Allow")) == (405, allowed), path


def test_head_is_answered_without_a_body(server):
    for path in ("/health", "/metrics", "/", "/v1/models"):
        reply, body = request(server, "HEAD", path)
        assert (reply.status, body) == (200, b""), path
        assert int(reply.getheader("Content-Length")) > 0
    assert request(server, "HEAD", "/v1/chat/completions")[0].status == 405


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_plain_replies(server, stream):
    body = json.dumps({"prompt": "import os", "max_tokens": 3, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    raw = raw_request(server, head.encode() + b"\r\n\r\n" + body, ends=False)
    head_back, _, answer = raw.partition(b"\r\n\r\n")
    assert b" 200 " in head_back.splitlines()[0]
    assert b"chunked" not in head_back.lower()
    assert f"content-length: {len(answer)}".encode() in head_back.lower()
    assert answer.endswith(b"data: [DONE]\n\n") if stream else json.loads(answer)["choices"]


def test_names_are_cleaned_before_they_are_logged(changed_package, start_server):
    server = start_server(changed_package(CHAT_TEMPLATE, name="nice\x1b[31m\nFORGED line"))
    (line,) = [line for line in server.log if " at http://" in line]
    assert "nice?[31m?FORGED line" in line


def test_the_openapi_document_describes_the_bodies(server):
    _, raw = request(server, "GET", "/openapi.json")
    document = json.loads(raw)
    names = set(document["components"]["schemas"])
    assert {"ChatBody", "CompletionBody", "ResponsesBody", "Message", "Tool"} <= names
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/ChatBody")


def test_replies_with_very_many_log_probabilities_are_whole(server):
    reply = server.client().completions.create(
        model=MODEL_NAME, prompt=[[7] * 300] * 4, n=2, max_tokens=1, logprobs=20, echo=True
    )
    assert len(reply.choices) == 8
    for choice in reply.choices:
        lists = choice.logprobs
        assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.text_offset) == 301
        assert lists.top_logprobs[0] is None and len(lists.top_logprobs[5]) > 1


def test_errors_of_the_sdk_keep_their_kinds(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, extra_body={"mirostat": 2}
        )
    assert caught.value.param == "mirostat"
