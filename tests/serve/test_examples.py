"""The examples run as they are, and serving needs no PyTorch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_the_image_holds_all_that_serving_imports_and_no_torch():
    code = "import sys, serve.server, serve.__main__; print(*sorted(sys.modules))"
    loaded = run([sys.executable, "-c", code]).split()
    text = (EXAMPLES / "Dockerfile").read_text().replace("\\\n", " ")
    own = [name for name in loaded if name.startswith("compressor.")]
    copied = set(re.findall(r"compressor/(\w+)\.py", text)) - {"__init__"}
    assert copied == {name.removeprefix("compressor.") for name in own}
    assert not {"torch", "transformers"} & set(loaded)
    installed = re.findall(r'"([\w-]+)>=', text)
    sources = [*REPOSITORY.glob("serve/*.py"), *(REPOSITORY / f"{name.replace('.', '/')}.py" for name in own)]
    direct = {name for path in sources for name in imported(path)} & set(loaded) - sys.stdlib_module_names
    with_others = {"starlette", "pydantic_core"}
    assert direct - {"compressor", "serve"} - with_others <= {name.replace("-", "_") for name in installed}


def imported(path: Path) -> set[str]:
    """Names of the packages that a file imports."""
    lines = path.read_text().splitlines()
    return {match[1] for line in lines if (match := re.match(r"\s*(?:from|import) (\w+)", line))}


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout
