"""``verify`` opens all that the endpoint will: template, tokenizer, ends, grammar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.engines import verify_package
from compressor.engines.served import prove as prove_served
from compressor.errors import PackageError
from tests.conftest import CHAT_TEMPLATE
from tests.serve.conftest import TOOLS_TEMPLATE, changed_package, tiny_package  # noqa: F401 # fixtures

Change = Callable[..., Path]


def lines(folder: Path, vocabulary: int = 512) -> str:
    return "\n".join(prove_served(folder, vocabulary))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHAT_TEMPLATE, "renders messages, a system message, tools and their results"),
        (TOOLS_TEMPLATE, "renders messages, a system message, tools and their results"),
        (
            "{% generation %}{{ messages[0] | tojson(ensure_ascii=False) }}{% endgeneration %}",
            "renders messages",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
            "refuses a system message (no system)",
        ),
    ],
    ids=["plain", "tools", "generation", "no-system"],
)
def test_templates_are_rendered(changed_package: Change, template, said):  # noqa: F811
    assert said in lines(changed_package(template))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for %}", "the chat template is broken"),
        ("{{ raise_exception('never') }}", "refuses a user's message (never)"),
        ("{{ messages[0].content.nothing.at_all }}", "refuses a user's message"),
    ],
)
def test_templates_that_cannot_be_served_are_damage(changed_package: Change, template, said):  # noqa: F811
    with pytest.raises(PackageError) as caught:
        lines(changed_package(template))
    assert said in str(caught.value)


def test_no_template_is_said(tiny_package: Path, tmp_path: Path):  # noqa: F811
    for name in ("tokenizer.json", "genai_config.json"):
        (tmp_path / name).write_text((tiny_package / name).read_text())
    assert "no chat template" in lines(tmp_path)


def test_a_vocabulary_larger_than_the_tokenizers_is_proved_with_its_grammar(changed_package: Change):  # noqa: F811
    said = lines(changed_package(CHAT_TEMPLATE), vocabulary=640)
    assert "JSON schema over 640 tokens" in said
    assert "texts end with '<|im_end|>'" in said


def test_a_tokenizer_larger_than_the_model_is_said(changed_package: Change):  # noqa: F811
    assert "knows 512 tokens, the model 500" in lines(changed_package(CHAT_TEMPLATE), vocabulary=500)


@pytest.mark.parametrize("ends", [512, -1, [2, 9999], "2", [None]])
def test_ends_that_are_no_tokens_are_damage(changed_package: Change, tiny_package: Path, ends):  # noqa: F811
    config = json.loads((tiny_package / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = ends
    with pytest.raises(PackageError, match="no token of the model"):
        lines(changed_package(CHAT_TEMPLATE, {"genai_config.json": json.dumps(config)}))


@pytest.mark.parametrize("text", ["", "[]", '{"model": 7}', "[" * 9999])
def test_a_broken_genai_config_is_damage(changed_package: Change, text):  # noqa: F811
    with pytest.raises(PackageError, match="missing or damaged"):
        lines(changed_package(CHAT_TEMPLATE, {"genai_config.json": text}))


@pytest.mark.parametrize("text", ["", "{}", "nothing"])
def test_a_broken_tokenizer_is_damage(changed_package: Change, text):  # noqa: F811
    with pytest.raises(PackageError, match="not a tokenizer"):
        lines(changed_package(CHAT_TEMPLATE, {"tokenizer.json": text}))


def test_verify_says_it_all(tiny_package: Path):  # noqa: F811
    said = "\n".join(verify_package(tiny_package))
    for words in ("chat template renders", "texts end with", "JSON schema over 512 tokens", "->"):
        assert words in said
