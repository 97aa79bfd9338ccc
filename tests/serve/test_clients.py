"""Other people's clients, each as its manual says, against a server of a model with and one without tools.

They run in an environment of their own (`make test-clients`): each case is a script that is given the
server's address and must print what the model was held to. A random model answers, so what is asked for is
what a schema or a forced call makes certain.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import MODEL_NAME, REPOSITORY, RunningServer

PYTHON = REPOSITORY / ".venv-clients" / "bin" / "python"
CASES = sorted(Path(__file__).with_name("clients").glob("*.py"))
SECONDS = 240


@pytest.mark.clients
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("which", ["server", "tools_server"])
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_client(request, case, which):
    if not PYTHON.is_file():
        pytest.skip("make test-clients installs the clients")
    server: RunningServer = request.getfixturevalue(which)
    variables = {
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": "unused",
        "MODEL": MODEL_NAME,
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HOME": str(request.getfixturevalue("tmp_path")),
    }
    result = subprocess.run(
        [str(PYTHON), str(case)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.strip().endswith("good")
