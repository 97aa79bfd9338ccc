"""Keys, limits, cancellation and shutdown: what keeps a server up."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from serve.settings import Settings
from tests.serve.conftest import MODEL_NAME, RunningServer

LONG = {"model": MODEL_NAME, "prompt": "import os", "max_tokens": 480, "extra_body": {"ignore_eos": True}}


def metric(server: RunningServer, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"edge_{name}"))


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def raw_request(server: RunningServer, payload: bytes, ends: bool = True) -> bytes:
    """What the server answers to bytes that no client library would send, after which none follow."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(payload)
        if ends and not payload.endswith(b"0\r\n\r\n"):
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def post(server: RunningServer, path: str, body: bytes) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def test_a_key_is_asked_for_everywhere_but_health_and_page(tiny_package, start_server):
    server = start_server(tiny_package, "--api-key", "s3cret")
    assert server.client("s3cret").models.list().data
    with pytest.raises(openai.AuthenticationError, match="API key"):
        server.client("wrong").models.list()
    for path, status in (("/health", 200), ("/", 200), ("/metrics", 401), ("/v1/models", 401)):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        connection.request("GET", path)
        assert connection.getresponse().status == status, path


def test_a_public_address_needs_a_key(tmp_path):
    from compressor.errors import InputError

    with pytest.raises(InputError, match="--api-key"):
        Settings(tmp_path, host="0.0.0.0")
    Settings(tmp_path, host="0.0.0.0", insecure=True)
    Settings(tmp_path, host="0.0.0.0", api_key="k")


def test_a_full_queue_is_429_with_retry_after(tiny_package, start_server):
    server = start_server(tiny_package, "--max-concurrency", "1", "--queue-size", "1")
    client = server.client()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(client.completions.create, **LONG) for _ in range(2)]
        wait_for(lambda: metric(server, "requests_waiting") == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**LONG)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        for request in running:
            assert request.result().usage.completion_tokens == 480


def test_too_slow_a_request_is_408(tiny_package, start_server):
    server = start_server(tiny_package, "--request-timeout", "0.05")
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().completions.create(**LONG)
    assert caught.value.status_code == 408
    wait_for(lambda: metric(server, "requests_running") == 0)


def test_clients_that_leave_free_their_rows(server):
    before = metric(server, "cancelled_total")
    client = server.client()
    streams = [client.completions.create(**LONG, stream=True) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    wait_for(lambda: metric(server, "requests_running") == 0)
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        body = json.dumps({"prompt": "import os", "max_tokens": 480, "ignore_eos": True})
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_for(lambda: metric(server, "requests_running") == 1)
    wait_for(lambda: metric(server, "requests_running") == 0)
    assert metric(server, "cancelled_total") > before
    assert client.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2


def test_sigterm_lets_running_requests_finish(tiny_package, start_server):
    server = start_server(tiny_package)
    chunks = []

    def read() -> None:
        chunks.extend(server.client().completions.create(**LONG, stream=True))

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: len(chunks) > 3)
    assert server.stop() == 0
    reader.join(10)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_metrics_count_what_happened(server):
    tokens = metric(server, "output_tokens_total")
    server.client().completions.create(**LONG | {"max_tokens": 7})
    assert metric(server, "output_tokens_total") == tokens + 7
    assert metric(server, "ttft_seconds_count") >= 1
    assert metric(server, "cache_tokens") <= metric(server, "cache_limit_tokens")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'{"prompt": NaN}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ""}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}',
        b'{"prompt": "a", "logit_bias": {"\\ud800": "x"}}',
        b'{"prompt": []}',
        b'{"prompt": [[]]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [99999999999999999999999]}',
        b'{"prompt": ["a", 1]}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": "a", "temperature": "hot"}',
        b'{"prompt": "a", "max_tokens": 1e99}',
        b'{"prompt": "a", "max_tokens": -5}',
        b'{"prompt": "a", "n": 100000}',
        b'{"prompt": "a", "seed": 99999999999999999999999999}',
        b'{"prompt": "a", "stop": [""]}',
        b'{"prompt": "a", "logit_bias": {"\xc2\xb2": 1}}',
        b'{"prompt": "a", "model": "' + b"x" * 5000 + b'"}',
        b"[" * 100000,
        b'{"prompt": ' + b"1" * 5000 + b"}",
        json.dumps({"prompt": "word " * 5000}).encode(),
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_nonsense_is_refused_in_openais_shape(server, body):
    status, answer = post(server, "/v1/completions", body)
    assert 400 <= status < 500
    assert answer["error"]["message"]


def test_schemas_that_cannot_be_obeyed_are_refused(server):
    for schema in ({"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"messages": [{"role": "user", "content": "a"}], "response_format": form}
        status, answer = post(server, "/v1/chat/completions", json.dumps(body).encode())
        assert status == 400, answer
        assert "schema" in answer["error"]["message"]


def test_bodies_that_are_too_big_are_413_announced_or_not(server):
    status, answer = post(server, "/v1/completions", b" " * (6 << 20))
    assert status == 413
    assert "send less" in answer["error"]["message"]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    chunked = raw_request(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 6 + b"0\r\n\r\n")
    assert chunked.startswith(b"HTTP/1.1 413")


def test_half_a_request_hurts_nobody(server):
    for payload in (b"", b"GARBAGE\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"):
        raw_request(server, payload)
    assert server.client().models.list().data


def test_unknown_paths_and_methods(server):
    assert post(server, "/v2/nothing", b"{}")[0] == 404
    assert post(server, "/v1/models", b"{}")[0] == 405


def test_prompts_stay_out_of_the_log(server):
    server.client().completions.create(**LONG | {"prompt": "a very private matter", "max_tokens": 2})
    assert "private" not in "".join(server.log)


def test_starting_on_what_is_no_package_is_one_line(tmp_path):
    assert "manifest.json" in refusal(tmp_path)


def refusal(*arguments):
    """The one line with which a server that cannot start ends."""
    command = [sys.executable, "-m", "serve", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_keys_and_values_are_kept_as_measured_or_as_told(narrow_package, start_server):
    as_measured, told = start_server(narrow_package), start_server(narrow_package, "--kv-cache", "fp32")
    texts = []
    for server, kept in ((as_measured, "int8"), (told, "fp32")):
        (model,) = server.client().models.list().data
        assert model.kv_cache == kept
        request = {"model": model.id, "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
        answers = [server.client().completions.create(**request).choices[0].text for _ in range(2)]
        assert answers[0] == answers[1]  # the second finds its beginning in the cache
        texts.append(answers[0])
    assert texts[0][:8] == texts[1][:8]


def test_a_package_without_scales_is_not_served_in_int8(tiny_package, narrow_package, tmp_path):
    line = refusal(tiny_package, "--kv-cache", "int8")
    assert "kv_scales.npz is missing" in line and "fp32" in line
    damaged = tmp_path / "damaged"
    shutil.copytree(narrow_package, damaged)
    size = (damaged / "kv_scales.npz").stat().st_size
    (damaged / "kv_scales.npz").write_bytes(b"\0" * size)
    assert "kv_scales.npz is damaged" in refusal(damaged)


def test_two_hundred_clients_of_which_half_leave(server):
    client = server.client()

    def visit(index: int) -> str:
        options = LONG | {"max_tokens": 12, "prompt": [index % 200 + 20, 30, 31]}
        try:
            if index % 2:
                with client.completions.create(**options, stream=True) as stream:
                    next(iter(stream))
                return "left"
            client.completions.create(**options)
            return "answered"
        except openai.RateLimitError:
            return "refused"

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(visit, range(200)))
    wait_for(lambda: metric(server, "requests_running") + metric(server, "requests_waiting") == 0)
    assert outcomes.count("refused") < 100
    assert metric(server, "cache_tokens") <= metric(server, "cache_limit_tokens")
    assert client.completions.create(**LONG | {"max_tokens": 3}).usage.completion_tokens == 3
