"""llm: the command, through its extra-openai-models.yaml."""

import os
import subprocess
import sys
from pathlib import Path

folder = Path(os.environ["HOME"]) / "llm"
folder.mkdir(exist_ok=True)
model, base = os.environ["MODEL"], os.environ["OPENAI_BASE_URL"]
entry = f"- model_id: ours\n  model_name: {model}\n  api_base: {base}\n  api_key_name: openai\n"
(folder / "extra-openai-models.yaml").write_text(entry)
command = [str(Path(sys.executable).with_name("llm")), "-m", "ours", "-o", "max_tokens", "4"]
for more in ([], ["--no-stream"]):
    variables = os.environ | {"LLM_USER_PATH": str(folder)}
    result = subprocess.run([*command, *more, "hello"], env=variables, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
print("good")
