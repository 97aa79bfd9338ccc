"""The examples run as they are, and serving needs no PyTorch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from tests.serve.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    result = run([str(EXAMPLES / "curl.sh"), server.url])
    assert '"object":"chat.completion"' in result
    assert "data: [DONE]" in result
    assert "edge_requests_running" in result


def test_openai_client(server):
    result = run([sys.executable, str(EXAMPLES / "openai_client.py"), server.url])
    assert re.search(r"^JSON: \{'city': .*'country': ", result, re.MULTILINE)


def test_the_unit_and_the_image_start_the_server_with_flags_it_has():
    known = run([sys.executable, "-m", "serve", "--help"])
    for name in ("edge-compressor.service", "Dockerfile"):
        text = (EXAMPLES / name).read_text()
        start = next(line for line in text.splitlines() if line.startswith(("ExecStart", "ENTRYPOINT")))
        flags = set(re.findall(r"--[a-z-]+", start))
        assert flags and all(flag in known for flag in flags)


def test_the_image_copies_all_that_serving_imports_and_no_torch():
    code = (
        "import sys, serve.server, serve.__main__\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('compressor', 'torch', 'transformers')))"
    )
    assert run([sys.executable, "-c", code]).strip() == (
        "['compressor', 'compressor.errors', 'compressor.manifest']"
    )


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout
