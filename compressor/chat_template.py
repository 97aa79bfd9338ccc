"""The chat templates of a model's folder: which there are, and what they make of messages.

Hugging Face's rules: a sandboxed Jinja with ``raise_exception``, ``strftime_now``, its own ``tojson`` and
``{% generation %}`` blocks; a template of its own for tools, where there is one. ``serve`` renders with
these, ``verify`` proves that it can.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from compressor.errors import PackageError

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
DEFAULT, FOR_TOOLS = "default", "tool_use"
"""Names of templates, as Hugging Face gives them."""


class TemplateRefusalError(Exception):
    """A template that can't render these messages, in its own words or in Jinja's."""


@dataclass(frozen=True)
class ChatTemplates:
    """The sources of a folder's templates, and the special tokens that they are given."""

    default: str
    for_tools: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def source(self, tools: bool) -> str:
        """Of the template for a request with or without tools."""
        return self.for_tools if tools and self.for_tools is not None else self.default

    @property
    def takes_tools(self) -> bool:
        """Whether a template reads the tools that it is given. Told by its tree: Jinja's own search would
        compute what is constant in a template, which may be without end."""
        names = parse(self.source(tools=True)).find_all(jinja2.nodes.Name)
        return any(name.name == "tools" and name.ctx == "load" for name in names)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. ``variables`` are further ones that the template may read. Raises
        ``TemplateRefusalError``; a hostile template may compute for ever."""
        values = {
            **self.special_tokens,
            **(variables or {}),
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            template = _environment().from_string(self.source(bool(tools)))
            return template.render(values)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise TemplateRefusalError(str(error)) from None
        except (RecursionError, MemoryError):
            raise TemplateRefusalError("it nests or grows without end") from None


def read_templates(folder: Path) -> ChatTemplates | None:
    """The templates of a folder; None if it has none. Raises ``PackageError`` for broken ones."""
    config = _read_config(folder / "tokenizer_config.json")
    sources = dict(_sources(folder, config))
    if not sources.get(DEFAULT):
        return None
    for source in sources.values():
        parse(source)
    tokens = {name: _token_text(config[name]) for name in config if name.endswith("_token") and config[name]}
    return ChatTemplates(sources[DEFAULT], sources.get(FOR_TOOLS), tokens)


def parse(source: str) -> jinja2.nodes.Template:
    """A template's tree, of which nothing is computed. Raises ``PackageError``."""
    try:
        return _environment().parse(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise PackageError(f"the chat template is broken ({error}): make the package again") from None


def describe(folder: Path) -> str:
    """One line about what a folder's templates take: a system message, a tool, the tool's result.

    Raises ``PackageError`` where they can't render even a user's message.
    """
    templates = read_templates(folder)
    if templates is None:
        return "no chat template: served for completions alone"
    try:
        templates.render(_TURNS[:1])
    except TemplateRefusalError as error:
        raise PackageError(
            f"{folder}: the chat template refuses a user's message ({error}): mend the model's template and "
            "make the package again"
        ) from None
    kinds = {
        "a system message": (_TURNS[1:2] + _TURNS[:1], None),
        "a tool": (_TURNS[:1], [_TOOL]),
        "a tool's result": (_TURNS[:1] + _TURNS[2:], [_TOOL]),
    }
    refused = []
    for kind, (messages, tools) in kinds.items():
        try:
            templates.render(messages, tools if templates.takes_tools else None)
        except TemplateRefusalError as error:
            refused.append(f"{kind} ({error})")
    taken = "the chat template renders messages, a system message, tools and their results"
    return f"the chat template refuses {', '.join(refused)}" if refused else taken


_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "How is the weather in Oslo?"},
    {"role": "system", "content": "Answer briefly."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call00001",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Oslo"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "rain"},
]
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model wrote, for training; the text is the same without."""

    tags = {"generation"}  # noqa: RUF012 # Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Nothing is computed while a template is compiled (``optimized``): that may be endless too."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _sources(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Templates by name; of two with a name the later counts, as in transformers."""
    given = config.get("chat_template")
    if isinstance(given, str):
        yield DEFAULT, given
    elif isinstance(given, list):
        for entry in given:
            if not (isinstance(entry, dict) and isinstance(entry.get("template"), str)):
                raise PackageError(
                    f"{folder}: a chat template in tokenizer_config.json has no text: make the package again"
                )
            yield str(entry.get("name")), entry["template"]
    paths = [(DEFAULT, folder / TEMPLATE_FILE)]
    paths += [(path.stem, path) for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    for name, path in paths:
        if path.is_file():
            try:
                yield name, path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise PackageError(f"{path} can't be read ({error}): copy the package again") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{path} is damaged ({error}): copy the package again") from None
    if not isinstance(config, dict):
        raise PackageError(f"{path} is damaged (it holds no object): copy the package again")
    return config


def _token_text(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: unlike Jinja's own it escapes nothing for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
