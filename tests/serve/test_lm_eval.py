"""lm-eval's own client scores the endpoint as the graph itself: the same log-likelihoods and accuracy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from serve.kvcache import KeyValueCache
from serve.model import Model, open_engine
from serve.package import open_package
from serve.sampling import logprob_of
from tests.serve.conftest import whole_package

REQUESTS = [
    ("import", " os"),
    ("from pathlib import Path", "\nimport pytest"),
    ("def make_tiny", "_model(folder"),
]

LOCAL_NAME = "arc_easy_local"
LOCAL_TASK = """task: arc_easy_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = 200


def test_local_completions_gives_the_graphs_log_likelihoods(server, tiny_package, tiny_model_folder):
    api_models = pytest.importorskip("lm_eval.models.openai_completions")
    scorer = api_models.LocalCompletionsAPI(
        model="tiny-int8",
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(tiny_model_folder),
        tokenized_requests=True,
        num_concurrent=2,
        max_retries=1,
    )
    results = scorer.loglikelihood([SimpleNamespace(args=request) for request in REQUESTS])
    for (context, continuation), (value, is_greedy) in zip(REQUESTS, results, strict=True):
        expected, greedy = _log_likelihood(tiny_package, context, continuation)
        assert value == pytest.approx(expected, abs=1e-3)
        assert is_greedy == greedy


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lm_eval_gives_the_packages_accuracy(starter, data_dir, start_server, tmp_path):
    package = whole_package(starter, tmp_path, "starter-int8")
    server = start_server(package)
    (tmp_path / "local.yaml").write_text(LOCAL_TASK.format(data=data_dir / "arc_easy" / "test.jsonl"))
    arguments = {
        "model": "starter-int8",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": starter,
        "tokenized_requests": True,
        "num_concurrent": 4,
    }
    command = [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--tasks", LOCAL_NAME, "--include_path", str(tmp_path), "--limit", str(QUESTIONS)]
    command += ["--output_path", str(tmp_path / "results")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    (report,) = (tmp_path / "results").rglob("results*.json")
    served = json.loads(report.read_text())["results"][LOCAL_NAME]
    own = _own_results(package, starter, tmp_path)
    print("served:", served, "own:", own)
    for metric in ("acc,none", "acc_norm,none"):
        assert served[metric] == own[metric]
    assert 0.3 < own["acc,none"] < 1


def _own_results(package_folder: Path, tokenizer_folder: Path, tasks: Path) -> dict[str, float]:
    """The same questions by the package's graph in this process."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    from compressor.evaluation.scorer import LogitsLM

    model = _open(package_folder, capacity=1024)

    def logits(ids):
        model.cache.drop(0)
        return model.score(0, ids.tolist())

    scorer = LogitsLM(logits, AutoTokenizer.from_pretrained(tokenizer_folder), 1024)
    manager = TaskManager(include_path=str(tasks))
    found = lm_eval.simple_evaluate(
        scorer, tasks=[LOCAL_NAME], limit=QUESTIONS, task_manager=manager, bootstrap_iters=0
    )
    assert found is not None
    return found["results"][LOCAL_NAME]


def _open(package_folder: Path, capacity: int) -> Model:
    package = open_package(package_folder)
    engine = open_engine(package.graph, threads=1)
    return Model(engine, KeyValueCache(engine.cache_shape(package.kv_heads, package.head_dim, capacity), 1))


def _log_likelihood(package_folder, context: str, continuation: str) -> tuple[float, bool]:
    package, model = open_package(package_folder), _open(package_folder, capacity=256)
    whole = package.tokenizer.encode(context + continuation)
    start = len(package.tokenizer.encode(context))
    logits = model.score(0, whole[:-1])
    picked = [(logits[i - 1], whole[i]) for i in range(start, len(whole))]
    total = sum(logprob_of(row, token, 0).logprob for row, token in picked)
    return total, all(int(np.argmax(row)) == token for row, token in picked)
