"""What is sent to vLLM to score choices: each distinct text once, and only what is wanted of it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from compressor.engines.vllm_score import Branches, Prompt
from compressor.evaluation.encoding import Encoded
from compressor.pipeline.vllm_artefact import branched

TOKENS = st.integers(0, 5)
REQUESTS = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=4), st.lists(TOKENS, min_size=1, max_size=4)),
    min_size=1,
    max_size=20,
)


def encoded(context: list[int], continuation: list[int]) -> Encoded:
    return Encoded((*context, *continuation), len(continuation))


def test_choices_of_one_word_are_one_prompt() -> None:
    requests = [encoded([1, 2, 3], [choice]) for choice in (7, 8, 9, 7)]
    prompts, places = branched(requests)
    assert prompts == [Prompt((1, 2, 3), 3, (7, 8, 9))]
    assert places == [(0, 0), (0, 1), (0, 2), (0, 0)]


def test_of_longer_choices_only_their_own_tokens_are_wanted() -> None:
    prompts, places = branched([encoded([1, 2], [3, 4, 5]), encoded([1, 2], [3, 9])])
    assert prompts == [Prompt((1, 2, 3), 2, (9,)), Prompt((1, 2, 3, 4), 2, (5,))]
    assert places == [(1, 0), (0, 0)]


def test_a_text_that_is_too_long_loses_its_beginning() -> None:
    assert Prompt((1, 2, 3, 4), 3, (5,)).within(3) == Prompt((2, 3, 4), 2, (5,))
    assert Prompt((1, 2, 3, 4), 1, (5,)).within(2) == Prompt((3, 4), 1, (5,))


@given(REQUESTS)
def test_texts_sent_are_the_distinct_inputs_and_every_request_is_answered(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    requests = [encoded(*pair) for pair in pairs]
    prompts, places = branched(requests)
    assert sorted(prompt.ids for prompt in prompts) == sorted({request.inputs for request in requests})
    for request, (number, final) in zip(requests, places, strict=True):
        prompt = prompts[number]
        chances = np.array([-float(token + position) for position, token in enumerate(prompt.ids)])
        top = np.ones(len(prompt.ids), np.bool_)
        ends = np.array([-10.0 * token for token in prompt.finals])
        found = Branches(chances[prompt.start :], top[prompt.start :], ends, ends == 0)
        value, greedy = found.of(final, request.scored)
        own = range(len(request.ids) - request.scored, len(request.ids) - 1)
        expected = sum(-float(request.ids[i] + i) for i in own) - 10.0 * request.ids[-1]
        assert value == expected and greedy == (request.ids[-1] == 0)
