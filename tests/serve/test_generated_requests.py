"""Requests that schemathesis generates from the OpenAPI schema, right and wrong ones: never a 500."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

REQUESTS = 5000
AN_OPERATION = 900  # examples: the ten operations have few or many, by what there is to vary


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_500_in_five_thousand_generated_requests(tiny_package, start_server, tmp_path):
    server = start_server(tiny_package, "--max-context", "64", "--request-timeout", "20")
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"]
    command += ["--max-examples", str(AN_OPERATION), "--seed", "8", "--no-shrink", "--continue-on-failure"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--no-color"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    replies = statuses(server.url)
    print(f"{sum(replies.values()):.0f} requests by status: {replies}")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert not [status for status in replies if status.startswith("5")]
    assert sum(replies.values()) >= REQUESTS
    assert server.client().models.list().data


def statuses(url: str) -> dict[str, float]:
    """Replies by status, as the server counted them."""
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    prefix = 'edge_http_responses_total{status="'
    return {
        line.removeprefix(prefix).split('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(prefix)
    }
