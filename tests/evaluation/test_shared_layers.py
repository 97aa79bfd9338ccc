"""Leading layers computed once: fewer of them, and the same results to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.evaluation.agreement import torch_predict
from compressor.evaluation.encoding import Encoded
from compressor.evaluation.scorer import Plan, score_plan
from compressor.evaluation.shared_layers import SharedLayers
from compressor.space import SearchSpace, SubNetwork
from compressor.supernet.elastic import Elastic


@pytest.fixture(scope="module")
def elastic(tiny_model_folder: Path) -> Elastic:
    return Elastic(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def subnets(elastic: Elastic) -> list[SubNetwork]:
    shape = elastic.shape
    depths = (shape.num_layers - 1, shape.num_layers)
    space = SearchSpace(shape, depths, (shape.intermediate_size // 2, shape.intermediate_size))
    rng = np.random.default_rng(0)
    return [space.sample(rng) for _ in range(12)]


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 512, (12, 24))


def sharing(elastic: Elastic, limit_bytes: int | None = None) -> SharedLayers:
    return SharedLayers(elastic.model, lambda: elastic.active, limit_bytes)


def test_agreement_is_the_same_to_the_last_bit(
    elastic: Elastic, subnets: list[SubNetwork], ids: np.ndarray
) -> None:
    shared = sharing(elastic)
    for subnet in subnets:
        with elastic.activated(subnet) as model:
            assert np.array_equal(torch_predict(model, shared)(ids), torch_predict(model)(ids))
    assert shared.layers_computed < 0.8 * shared.layers_asked


def test_scores_on_prefixes_that_requests_share_are_the_same(
    elastic: Elastic, subnets: list[SubNetwork]
) -> None:
    plan = Plan.of(_requests())
    assert any(step.keep for step in plan.steps(torch.device("cpu"), torch.float32))
    shared = sharing(elastic)
    for subnet in subnets:
        with elastic.activated(subnet) as model:
            ours, alone = score_plan(plan, model, shared), score_plan(plan, model)
        assert np.array_equal(ours.values, alone.values)
        assert np.array_equal(ours.greedy, alone.greedy)
    assert shared.layers_computed < 0.8 * shared.layers_asked


def test_other_questions_share_nothing(elastic: Elastic, subnets: list[SubNetwork], ids: np.ndarray) -> None:
    shared = sharing(elastic)
    with elastic.activated(subnets[0]) as model:
        torch_predict(model, shared)(ids)
        assert np.array_equal(torch_predict(model, shared)(ids[::-1]), torch_predict(model)(ids[::-1]))
    assert shared.layers_computed == shared.layers_asked


def test_a_model_that_is_no_sub_network_is_computed_whole(elastic: Elastic, ids: np.ndarray) -> None:
    shared = sharing(elastic)
    torch_predict(elastic.reset(), shared)(ids)
    assert shared.layers_asked == shared.kept_bytes == 0


def test_no_more_is_kept_than_allowed(elastic: Elastic, subnets: list[SubNetwork], ids: np.ndarray) -> None:
    state = ids.size * elastic.shape.hidden_size * 4
    limit = 20 * state
    shared = sharing(elastic, limit)
    for subnet in subnets:
        with elastic.activated(subnet) as model:
            assert np.array_equal(torch_predict(model, shared)(ids), torch_predict(model)(ids))
        assert shared.kept_bytes <= limit
    assert shared.kept_bytes > 10 * state


def test_states_too_large_to_be_met_again_are_not_kept(
    elastic: Elastic, subnets: list[SubNetwork], ids: np.ndarray
) -> None:
    shared = sharing(elastic, 4 * ids.size * elastic.shape.hidden_size)
    with elastic.activated(subnets[0]) as model:
        torch_predict(model, shared)(ids)
    assert shared.kept_bytes == 0


def _requests() -> list[Encoded]:
    """Four choices on each of a few contexts, after a prefix that all of them share."""
    rng = np.random.default_rng(2)
    prefix = rng.integers(0, 512, 700).tolist()
    contexts = [[*prefix, *rng.integers(0, 512, 10).tolist()] for _ in range(40)]
    return [
        Encoded((*context, *rng.integers(0, 512, 3).tolist()), 3) for context in contexts for _ in range(4)
    ]
