"""The model's chat template: messages to the prompt it was trained on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from compressor.errors import PackageError
from serve.errors import bad_request


class ChatTemplate:
    """A sandboxed Jinja template with the variables that Hugging Face's templates expect."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._special_tokens = special_tokens
        self._source = source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise PackageError(f"the chat template is broken ({error}): make the package again") from None

    @property
    def takes_tools(self) -> bool:
        return "tools" in self._source

    @property
    def tool_style(self) -> str:
        """How the model writes a call: ``hermes`` (in <tool_call> tags) or ``json`` (a bare object)."""
        return "hermes" if "<tool_call>" in self._source else "json"

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt. Raises ``ApiError`` where the template refuses the messages."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise bad_request(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from None


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a package folder, or None if the model has none."""
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else _default(config.get("chat_template"))
    if not source:
        return None
    tokens = {name: _token_text(config[name]) for name in config if name.endswith("_token") and config[name]}
    return ChatTemplate(source, tokens)


def _default(template: Any) -> str:
    """A template is a string or a list of named ones."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return str(named.get("default", ""))
    return template or ""


def _token_text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
