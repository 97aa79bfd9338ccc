"""pydantic-ai: structured output over chat completions and over the Responses API."""

import os
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel


class Person(BaseModel, extra="forbid"):
    name: Literal["Ann", "Bob"]


for kind in (OpenAIChatModel, OpenAIResponsesModel):
    model = kind(os.environ["MODEL"])
    settings = {"max_tokens": 90}
    by_tool = Agent(model, output_type=Person, model_settings=settings)
    assert by_tool.run_sync("Who is it?").output.name in ("Ann", "Bob"), kind
    native = Agent(model, output_type=NativeOutput(Person), model_settings=settings)
    assert native.run_sync("Who is it?").output.name in ("Ann", "Bob"), kind
    plain = Agent(model, model_settings={"max_tokens": 4})
    try:
        assert isinstance(plain.run_sync("hello").output, str)
    except Exception as error:  # it takes a reply that was cut for its own reasons amiss
        assert "token limit" in str(error).lower(), error
print("good")
