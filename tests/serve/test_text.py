"""Tokens to text, stop strings, sampling and chat templates, each by itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.chat_template import ChatTemplates, TemplateRefusalError
from serve.sampling import Sampler, SamplingParams, logprob_of
from serve.stops import StopMatcher
from serve.tokenizer import Tokenizer
from serve.tools import ToolParser


@pytest.fixture(scope="module")
def tokenizer(tiny_package: Path) -> Tokenizer:
    return Tokenizer(tiny_package / "tokenizer.json")


def test_streamed_text_is_the_whole_text_at_any_cut(tokenizer):
    text = "naïve 東京 🦙🦙 e\u0301 \t\n  12 x"
    stream = tokenizer.stream()
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_marked(tokenizer):
    stream = tokenizer.stream()
    tokens = tokenizer.encode("🦙")
    assert "".join(stream.add(token) for token in tokens[:-1]) == ""
    assert "\ufffd" in stream.flush()


def test_token_bytes_are_exact(tokenizer):
    text = "東京 🦙"
    assert b"".join(tokenizer.token_bytes(t) for t in tokenizer.encode(text)) == text.encode()


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stops_are_found_however_the_text_is_cut(text, stops, cuts):
    matcher, shown = StopMatcher(stops), ""
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(edges):
        shown += matcher.add(text[start:end])
        if matcher.matched:
            break
        assert not any(stop in shown for stop in stops)
    shown += matcher.flush()
    if any(stop in text for stop in stops):
        assert matcher.matched
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    else:
        assert not matcher.matched
        assert shown == text


LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))


def frequencies(params: SamplingParams, draws: int = 4000) -> np.ndarray:
    sampler = Sampler(params)
    return np.bincount([sampler.choose(LOGITS) for _ in range(draws)], minlength=5) / draws


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(seed=0), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (SamplingParams(seed=0, top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
        (SamplingParams(seed=0, top_p=0.7), [2 / 3, 1 / 3, 0, 0, 0]),
        (SamplingParams(seed=0, top_p=0.76), [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),
        (SamplingParams(seed=0, min_p=0.29), [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),
        (SamplingParams(seed=0, temperature=0.5), [0.7256, 0.1814, 0.0653, 0.0142, 0.0026]),
        (SamplingParams(seed=0, logit_bias={0: -100}), [0, 0.5, 0.3, 0.14, 0.06]),
    ],
)
def test_samples_follow_the_distribution(params, expected):
    np.testing.assert_allclose(frequencies(params), expected, atol=0.025)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_a_temperature_close_to_0_is_greedy(temperature):
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=5e-324))
    assert sampler.choose(np.array([-3.0, 2.0, 1.9], np.float32)) == 1


def test_nucleus_of_a_flat_distribution_is_wide():
    flat = np.zeros(5000, np.float32)
    sampler = Sampler(SamplingParams(seed=1, top_p=0.9))
    assert len({sampler.choose(flat) for _ in range(3000)}) > 1500


def test_frequency_penalty_grows_with_each_use():
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=0.5))
    logits = np.array([1.0, 0.3, 0.0], np.float32)
    assert [sampler.choose(logits) for _ in range(4)] == [0, 0, 1, 0]


def test_logprobs_are_normalized():
    entry = logprob_of(LOGITS, 1, 2)
    assert entry.logprob == pytest.approx(np.log(0.25), abs=1e-5)
    assert [token for token, _ in entry.top] == [0, 1]


def test_templates_run_in_a_sandbox_and_refuse_in_their_own_words():
    with pytest.raises(TemplateRefusalError, match="roles must alternate"):
        ChatTemplates("{{ raise_exception('roles must alternate') }}").render([])
    with pytest.raises(TemplateRefusalError):
        ChatTemplates("{{ ''.__class__.__mro__ }}").render([])
    templates = ChatTemplates(
        "{{ bos_token }}{{ messages[0] | tojson }}", special_tokens={"bos_token": "<s>"}
    )
    assert templates.render([{"a": "é"}]) == '<s>{"a": "é"}'


CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    ("style", "text", "shown"),
    [
        ("hermes", f"Let me see.<tool_call>\n{CALL}\n</tool_call>", "Let me see."),
        ("json", CALL, ""),
        ("json", CALL.replace("arguments", "parameters"), ""),
    ],
)
def test_tool_calls_are_split_from_text_in_any_pieces(style, text, shown):
    for size in (1, 3, 1000):
        parser = ToolParser(style)
        content = "".join(parser.add(text[i : i + size]) for i in range(0, len(text), size))
        rest, (call,) = parser.finish()
        assert content + rest == shown
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}


@pytest.mark.parametrize("text", ["plain", "{not json", "<tool_call>broken", "a < b", '{"a": 1}'])
@pytest.mark.parametrize("style", ["hermes", "json", None])
def test_what_is_no_call_is_text(style, text):
    parser = ToolParser(style)
    content = "".join(parser.add(letter) for letter in text)
    rest, calls = parser.finish()
    assert (content + rest, calls) == (text, [])
