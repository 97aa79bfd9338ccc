"""lm-eval's own client scores the endpoint to the same log-likelihoods as the graph itself."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from serve.kvcache import KeyValueCache
from serve.model import Model, open_engine
from serve.package import open_package
from serve.sampling import logprob_of

REQUESTS = [
    ("import", " os"),
    ("from pathlib import Path", "\nimport pytest"),
    ("def make_tiny", "_model(folder"),
]


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


def _log_likelihood(package_folder, context: str, continuation: str) -> tuple[float, bool]:
    package = open_package(package_folder)
    engine = open_engine(package.graph, threads=1)
    shape = engine.cache_shape(package.kv_heads, package.head_dim, 256)
    model = Model(engine, KeyValueCache(shape, 1))
    whole = package.tokenizer.encode(context + continuation)
    start = len(package.tokenizer.encode(context))
    logits = model.score(0, whole[:-1])
    picked = [(logits[i - 1], whole[i]) for i in range(start, len(whole))]
    total = sum(logprob_of(row, token, 0).logprob for row, token in picked)
    return total, all(int(np.argmax(row)) == token for row, token in picked)
