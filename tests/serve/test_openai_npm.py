"""Every feature through the official npm client: the cases are in openai_client.mjs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import MODEL_NAME, REPOSITORY

CLIENT = "openai@7.57.0"
FOLDER = REPOSITORY / "tests" / ".cache" / "npm"
CASES = Path(__file__).with_name("openai_client.mjs")


@pytest.fixture(scope="module")
def installed_client() -> Path:
    """The folder that the client is installed in; once for all runs."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    if not (FOLDER / "node_modules" / "openai").is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [
            "npm",
            "install",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--prefix",
            str(FOLDER),
            CLIENT,
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if result.returncode:
            pytest.skip(f"npm cannot install {CLIENT} here: {result.stderr.strip()[:200]}")
    return FOLDER


def test_the_npm_client(server, tools_server, installed_client):
    variables = {
        "OPENAI_FOLDER": str(installed_client),
        "SERVER_URL": server.url,
        "TOOLS_URL": tools_server.url,
        "MODEL": MODEL_NAME,
    }
    result = subprocess.run(
        ["node", "--test", str(CASES)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "fail 0" in result.stdout
