"""Every feature through the official client, against a real server process."""

from __future__ import annotations

import json

import openai
import pytest

from serve.package import open_package
from tests.serve.conftest import MODEL_NAME

QUESTION = [{"role": "user", "content": "def make_tiny_model"}]


def chat(client: openai.OpenAI, **options):
    settings = {"model": MODEL_NAME, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**(settings | options))


def complete(client: openai.OpenAI, **options):
    settings = {"model": MODEL_NAME, "prompt": "import os", "max_tokens": 8, "temperature": 0}
    return client.completions.create(**(settings | options))


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == MODEL_NAME
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME


def test_chat_answers_and_counts_tokens(client):
    reply = chat(client)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8


def test_a_stream_adds_up_to_the_whole(client):
    whole = chat(client, max_tokens=40).choices[0].message.content
    chunks = list(chat(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 40


def test_completions_stream_too(client):
    whole = complete(client, max_tokens=30).choices[0].text
    chunks = list(complete(client, max_tokens=30, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


def test_greedy_repeats_and_seeds_repeat(client):
    assert complete(client).choices[0].text == complete(client).choices[0].text
    seeded = [
        complete(client, temperature=1.5, seed=seed, max_tokens=24).choices[0].text for seed in (1, 1, 2)
    ]
    assert seeded[0] == seeded[1] != seeded[2]


def test_several_choices_differ_and_count_the_prompt_once(client):
    one = complete(client, temperature=1.5, seed=3)
    reply = complete(client, temperature=1.5, seed=3, n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.text for choice in reply.choices}) == 3
    assert reply.choices[0].text == one.choices[0].text
    assert reply.usage.prompt_tokens == one.usage.prompt_tokens
    assert reply.usage.completion_tokens == 24


def test_several_prompts_in_one_request(client):
    prompts = ["import os", "from pathlib", [5, 6, 7]]
    texts = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    assert [c.text for c in complete(client, prompt=prompts[:2]).choices] == texts[:2]
    assert complete(client, prompt=[[5, 6, 7]]).choices[0].text == texts[2]


def test_a_stop_string_ends_the_text_before_itself_in_streams_too(client):
    text = complete(client, max_tokens=40).choices[0].text
    stop = text[10:13]
    expected = text[: text.index(stop)]
    reply = complete(client, max_tokens=40, stop=[stop, "never"])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected, "stop")
    chunks = list(complete(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_logit_bias_forces_and_forbids(client):
    forced = complete(client, logit_bias={"77": 100}, logprobs=0, max_tokens=3)
    assert len(set(forced.choices[0].logprobs.tokens)) == 1
    plain = complete(client, logprobs=1, max_tokens=1).choices[0].logprobs.tokens[0]
    first = client.post("/../tokenize", body={"prompt": plain}, cast_to=object)["tokens"][0]
    other = complete(client, logit_bias={str(first): -100}, logprobs=1, max_tokens=1)
    assert other.choices[0].logprobs.tokens[0] != plain


def test_a_presence_penalty_breaks_repetition(client):
    forced = {"logit_bias": {"77": 100, "78": 99}, "max_tokens": 2, "logprobs": 0}
    plain = complete(client, **forced).choices[0].logprobs.tokens
    penalised = complete(client, presence_penalty=2, **forced).choices[0].logprobs.tokens
    assert plain[0] == plain[1]
    assert penalised[0] == plain[0] != penalised[1]


def test_chat_logprobs_are_of_the_shown_tokens(client):
    reply = chat(client, logprobs=True, top_logprobs=3, max_tokens=5)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 5
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == (
        reply.choices[0].message.content
    )
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob


def test_echo_scores_the_prompt(client):
    prompt = [40, 41, 42, 43, 44]
    reply = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=1)
    scores = reply.choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == 6
    assert scores.token_logprobs[0] is None
    assert all(value < 0 for value in scores.token_logprobs[1:])
    head = complete(client, prompt=prompt[:3], logprobs=2, max_tokens=1, logit_bias={"43": 100})
    assert scores.token_logprobs[3] == pytest.approx(head.choices[0].logprobs.token_logprobs[0], abs=0.3)


def test_the_token_that_ends_a_text_is_scored_too(client, tiny_package):
    """lm-eval's client takes the last token for a generated one."""
    (end,) = open_package(tiny_package).eos_tokens
    scored = {"prompt": [40, 41, 42], "logprobs": 1, "max_tokens": 4, "logit_bias": {str(end): 100}}
    (choice,) = complete(client, **scored, echo=True).choices
    assert choice.finish_reason == "stop"
    assert choice.logprobs.tokens[3:] == ["<|im_end|>"]
    assert len(choice.logprobs.token_logprobs) == 4
    (choice,) = complete(client, **scored).choices
    assert (choice.text, choice.logprobs.tokens) == ("", ["<|im_end|>"])


def test_json_object_and_schema_are_obeyed(client):
    reply = chat(client, response_format={"type": "json_object"}, max_tokens=200, temperature=1, seed=5)
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content), dict)
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Bob"]}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    reply = chat(client, response_format=form, max_tokens=100)
    person = json.loads(reply.choices[0].message.content)
    assert person["name"] in ("Ann", "Bob")
    assert isinstance(person["old"], bool)
    assert reply.choices[0].finish_reason == "stop"


def test_responses_in_text_form(client):
    reply = client.responses.create(model=MODEL_NAME, input="hello", max_output_tokens=6, temperature=0)
    assert reply.status == "incomplete"
    assert reply.usage.output_tokens == 6
    with client.responses.stream(
        model=MODEL_NAME, input="hello", max_output_tokens=6, temperature=0
    ) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    assert text == reply.output_text != ""


def test_text_and_tokens_go_there_and_back(client):
    text = "naïve 東京\n\tdef f(x): return 12"
    tokens = client.post("/../tokenize", body={"prompt": text}, cast_to=object)
    assert tokens["count"] == len(tokens["tokens"])
    back = client.post("/../detokenize", body={"tokens": tokens["tokens"]}, cast_to=object)
    assert back["prompt"] == text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": "gpt-99"}, openai.NotFoundError, "not served here"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 900}]}, openai.BadRequestError, "shorten"),
        ({"reasoning_effort": "high"}, openai.BadRequestError, "'reasoning_effort' is not supported"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "token id"),
        ({"top_logprobs": 2}, openai.BadRequestError, "logprobs"),
    ],
)
def test_errors_say_what_to_change(client, options, error, words):
    with pytest.raises(error) as caught:
        chat(client, **options)
    assert words in str(caught.value)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
