"""Clients that mean harm: the others are answered meanwhile, and each harm ends in an error that says why.

Bounds are generous: before, each of these held everybody up for half a minute or for ever.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from serve.connections import HEADER_SECONDS
from tests.serve.conftest import MODEL_NAME, RunningServer
from tests.serve.test_operation import LONG, metric, post, wait_for

PATIENCE = 3.0  # seconds; an undisturbed /health takes milliseconds
QUESTION = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}


@contextmanager
def health_is_watched(server: RunningServer) -> Iterator[list[float]]:
    """Asks for /health all the time, on new connections; every wait must be bearable."""
    waits: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            began = time.monotonic()
            connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()
            waits.append(time.monotonic() - began)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield waits
    finally:
        over.set()
        watcher.join()
    assert waits and max(waits) < PATIENCE


def schema_body(schema: dict, **fields: object) -> bytes:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return json.dumps(QUESTION | {"response_format": form} | fields).encode()


def optional(count: int) -> dict:
    names = {f"p{index}": {"type": "string"} for index in range(count)}
    return {"type": "object", "properties": names, "additionalProperties": False}


def test_text_far_too_long_is_refused_soon_and_holds_up_nobody(server):
    digits = json.dumps(QUESTION | {"messages": [{"role": "user", "content": "1234567890" * 390_000}]})
    with health_is_watched(server):
        status, answer = post(server, "/v1/chat/completions", digits.encode())
    assert status == 400
    assert "shorten" in answer["error"]["message"]
    assert answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("piece", [b"[]", b"{}", b"-1", b"1", b'""', b"1.5"])
def test_bodies_of_a_million_values_are_refused_soon_and_hold_up_nobody(server, piece):
    body = b'{"prompt": [' + piece + (b"," + piece) * 1_000_000 + b"]}"
    with health_is_watched(server):
        status, answer = post(server, "/v1/completions", body)
    assert status == 400
    assert "JSON values" in answer["error"]["message"]


def test_a_long_body_of_text_is_taken(server):
    status, answer = post(server, "/tokenize", json.dumps({"prompt": "word " * 60_000}).encode())
    assert status == 200
    assert answer["count"] >= 60_000


@pytest.mark.parametrize("body", [b"[" * 60_000, b'{"messages": ' + b'[{"a":' * 20_000, b'{"a"' * 40_000])
def test_endless_nesting_is_a_400(server, body):
    assert post(server, "/v1/chat/completions", body)[0] == 400


def test_arguments_nested_without_end_are_a_400(tools_server):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "[" * 10_000}}
    messages = [*QUESTION["messages"], {"role": "assistant", "tool_calls": [call]}]
    status, answer = post(tools_server, "/v1/chat/completions", json.dumps({"messages": messages}).encode())
    assert status == 400
    assert "arguments are not JSON" in answer["error"]["message"]


@pytest.mark.parametrize("count", [1_000, 4_000, 10_000])
def test_schemas_that_take_too_long_are_refused_and_hold_up_nobody(server, count):
    with health_is_watched(server):
        status, answer = post(server, "/v1/chat/completions", schema_body(optional(count)))
        assert server.client().completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2
    assert status == 400
    message = answer["error"]["message"]
    assert "too complex" in message or "processor time" in message
    assert "\n" not in message and "item" not in message  # of the parser's state


@pytest.mark.parametrize("pattern", ["(.{0,1000}){1000}", "(x+x+)+y", "(a{1,100}){1,100}(b|c){1,300}"])
def test_pattern_bombs_never_are_the_servers_fault(server, pattern):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": pattern}},
        "required": ["a"],
    }
    with health_is_watched(server):
        status, _ = post(server, "/v1/chat/completions", schema_body(schema, max_tokens=16))
    assert status in (200, 400)


def test_a_large_enum_with_many_choices_is_obeyed(server):
    schema = {"enum": [f"value number {index}" for index in range(20_000)]}
    with health_is_watched(server):
        status, answer = post(server, "/v1/chat/completions", schema_body(schema, n=16))
    assert status == 200
    assert len(answer["choices"]) == 16
    assert all('"value number '.startswith(c["message"]["content"][:14]) for c in answer["choices"])


def test_the_same_schema_is_compiled_once(server):
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        assert post(server, "/v1/chat/completions", schema_body(optional(10_001)))[0] == 400
        seconds.append(time.monotonic() - began)
    assert seconds[1] < seconds[0] / 2


def test_what_abandoned_clients_asked_for_is_given_up(server):
    """Each would take minutes; plain chats and other schemas are answered after moments."""
    host = server.url.removeprefix("http://")
    for number in range(6):
        connection = http.client.HTTPConnection(host, timeout=60)
        head = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", schema_body(optional(12_000 + number)), head)
        time.sleep(0.1)
        connection.close()
    began = time.monotonic()
    assert post(server, "/v1/chat/completions", json.dumps(QUESTION).encode())[0] == 200
    assert post(server, "/v1/chat/completions", schema_body({"enum": ["a", "b"]}))[0] == 200
    assert time.monotonic() - began < 2 * PATIENCE


def test_what_is_being_prepared_takes_a_place_in_the_queue(tiny_package, start_server):
    server = start_server(tiny_package, "--max-concurrency", "1", "--queue-size", "1")
    replies: list[int] = []

    def ask(number: int) -> None:
        replies.append(post(server, "/v1/chat/completions", schema_body(optional(9_000 + number)))[0])

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert replies.count(429) >= 3
    assert replies.count(400) >= 1
    assert post(server, "/v1/chat/completions", json.dumps(QUESTION).encode())[0] == 200


@pytest.fixture(scope="module")
def small_server(tiny_package, start_server) -> RunningServer:
    """It takes 16 connections, 8 from one address."""
    return start_server(tiny_package, "--max-connections", "16")


def connections_to(server: RunningServer, count: int, payload: bytes) -> list[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    connections = [socket.create_connection((host, int(port)), timeout=30) for _ in range(count)]
    for connection in connections:
        connection.sendall(payload)
    return connections


def test_half_open_connections_keep_nobody_out(small_server):
    half = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    connections = connections_to(small_server, 100, half)
    with health_is_watched(small_server):
        assert small_server.client().completions.create(**LONG | {"max_tokens": 3}).choices
    answers = [end_of(connection) for connection in connections[:50]]
    assert not any(answers)  # closed for those that came later


def test_a_head_that_never_ends_is_given_up(small_server):
    (slow,) = connections_to(small_server, 1, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
    began = time.monotonic()
    for _ in range(int(HEADER_SECONDS) * 4):
        time.sleep(0.5)
        try:
            slow.sendall(b"X: y\r\n")
        except OSError:
            break
        if time.monotonic() - began > HEADER_SECONDS + 1:
            break
    assert b" 408 " in end_of(slow)


def end_of(connection: socket.socket) -> bytes:
    """What was still answered before the server closed the connection."""
    answer = b""
    connection.settimeout(3 * HEADER_SECONDS)
    try:
        while part := connection.recv(65536):
            answer += part
    except ConnectionResetError:
        pass
    return answer


def test_with_all_connections_at_work_operations_are_answered(small_server):
    """Bodies are whole, so that none of them can be told from a client who waits for an answer."""
    body = json.dumps({"prompt": "import os", "max_tokens": 480, "ignore_eos": True, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"  # noqa: E501
    working = connections_to(small_server, 8, (head + body).encode())
    wait_for(lambda: metric(small_server, "requests_running") == 8)
    status, answer = post(small_server, "/v1/completions", b'{"prompt": "a"}')
    assert (status, "connections" in answer["error"]["message"]) == (503, True)
    with health_is_watched(small_server):
        time.sleep(0.1)
    for connection in working:
        connection.close()
    wait_for(lambda: metric(small_server, "requests_running") == 0)
    assert post(small_server, "/v1/completions", b'{"prompt": "a", "max_tokens": 1}')[0] == 200


def test_sigterm_keeps_its_promise_and_streams_end_whole(tiny_package, start_server):
    server = start_server(tiny_package, "--drain-seconds", "2", "--max-concurrency", "1")
    text: dict[str, bytes] = {}

    def read(path: str, body: dict) -> None:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        text[path] = connection.getresponse().read()

    endless = {"prompt": ["import os"] * 16, "n": 2, "max_tokens": 490, "ignore_eos": True, "stream": True}
    waiting = {"input": "a", "stream": True}
    readers = [
        threading.Thread(target=read, args=("/v1/completions", endless)),
        threading.Thread(target=read, args=("/v1/responses", waiting)),
    ]
    readers[0].start()
    wait_for(lambda: metric(server, "requests_running") == 1)
    readers[1].start()
    wait_for(lambda: metric(server, "requests_waiting") == 32)
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 2 + PATIENCE
    for reader in readers:
        reader.join(10)
    for path, said in text.items():
        assert said.endswith(b"data: [DONE]\n\n"), path
        assert b"shutting down" in said, path


@pytest.mark.parametrize(
    "template",
    [
        "{{ 10 ** (10 ** 8) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}",  # noqa: E501
        "{{ 'a' * 10 ** 9 * 9 }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",  # noqa: E501
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ],
    ids=["power", "ranges", "repeat", "doubling", "macro"],
)
def test_endless_templates_end(changed_package, start_server, template):
    server = start_server(changed_package(template))
    with health_is_watched(server):
        status, answer = post(server, "/v1/chat/completions", json.dumps(QUESTION).encode())
    assert status == 400
    assert "chat template" in answer["error"]["message"]
    assert post(server, "/v1/completions", b'{"prompt": "a", "max_tokens": 1}')[0] == 200
    server.stop()


def test_a_stream_goes_on_beside_them_all(server):
    """Its longest gap stays near those before."""
    gaps: list[float] = []
    ended = threading.Event()

    def read() -> None:
        last = time.monotonic()
        options = LONG | {"model": MODEL_NAME, "stream": True}
        for _ in range(3):
            for _ in server.client().completions.create(**options):
                now = time.monotonic()
                gaps.append(now - last)
                last = now
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    hostile: list[Callable[[], object]] = [
        lambda: post(server, "/v1/completions", json.dumps({"prompt": "7" * 3_000_000}).encode()),
        lambda: post(server, "/v1/completions", b'{"prompt": [' + b"{}," * 900_000 + b"1]}"),
        lambda: post(server, "/v1/chat/completions", schema_body(optional(4_001))),
    ]
    while not ended.is_set():
        for attack in hostile:
            attack()
    reader.join()
    assert max(gaps) < PATIENCE
