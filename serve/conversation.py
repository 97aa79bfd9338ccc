"""A conversation to be answered, whichever endpoint it came by, and what it asks of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.errors import bad_request
from serve.grammar import GrammarConstraint
from serve.prompts import chat_prompt
from serve.requests import repeat
from serve.sampling import SamplingParams
from serve.schemas import Message, Tool
from serve.sequence import GenerationRequest
from serve.service import Service
from serve.tools import Choice, Style, ToolParser, call_schema, check_choice, must_call, style_of, tags


@dataclass(frozen=True)
class Conversation:
    """Messages, and how the next one is to be."""

    messages: Sequence[Message]
    sampling: SamplingParams
    eos_tokens: frozenset[int]
    tools: Sequence[Tool] | None = None
    choice: Choice = None
    schema: Mapping[str, Any] | None = None
    """Of the text, if it is to be JSON; a reply that must be a call has none."""
    max_tokens: int | None = None
    count: int = 1
    stops: Sequence[str] = ()
    top_logprobs: int | None = None
    variables: Mapping[str, Any] | None = None
    """Further ones for the chat template."""
    messages_param: str = "messages"
    format_param: str = "response_format"

    def check(self) -> None:
        """Raises ``ApiError`` for what needs no work to be seen."""
        check_choice(self.tools, self.choice)

    @property
    def shown_tools(self) -> Sequence[Tool] | None:
        """Those that the model is told of."""
        return self.tools if self.choice != "none" else None

    def parser(self, style: Style, parallel: bool | None) -> ToolParser:
        """For one reply to it."""
        return ToolParser(style if self.shown_tools else None, 1 if parallel is False else None)

    async def prepare(self, service: Service) -> tuple[list[GenerationRequest], list[GrammarConstraint]]:
        """What the engine is to do, with a constraint for each or none. Raises ``ApiError``."""
        prompt = await chat_prompt(
            service, self.messages, self.shown_tools, self.variables, self.messages_param
        )
        request = GenerationRequest(
            prompt=tuple(prompt),
            sampling=self.sampling,
            max_tokens=service.check_tokens(prompt, self.max_tokens, self.messages_param),
            eos_tokens=self.eos_tokens,
            stops=self.stops,
            top_logprobs=self.top_logprobs,
            deadline=service.deadline(),
        )
        return repeat(request, self.count), await self._constraints(service)

    async def _constraints(self, service: Service) -> list[GrammarConstraint]:
        if self.tools and must_call(self.tools, self.choice):
            style = style_of(service.package.template)
            schema = call_schema(self.tools, self.choice, style)
            return await service.grammars.tagged_json(schema, *tags(style), self.count)
        if self.schema is not None:
            return await service.grammars.json_schema(self.schema, self.count, self.format_param)
        return []


def format_schema(kind: str | None, schema: Mapping[str, Any] | None, param: str) -> Mapping[str, Any] | None:
    """The schema of a text format: None for text. Raises ``ApiError``."""
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return schema if schema is not None else {"type": "object"}
    if schema is None:
        raise bad_request("the format json_schema needs a schema", param)
    return schema
