"""openai-agents: an agent with a tool and a typed output, over both APIs."""

import asyncio
import os
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI
from pydantic import BaseModel


class Person(BaseModel, extra="forbid"):
    name: Literal["Ann", "Bob"]


called: list[str] = []


@function_tool
def look(city: Literal["Oslo", "Rome"]) -> str:
    """The weather in a city."""
    called.append(city)
    return "rain"


async def main() -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model=os.environ["MODEL"], openai_client=AsyncOpenAI(max_retries=0))
        settings = ModelSettings(max_tokens=90)
        typed = Agent(name="a", model=model, output_type=Person, model_settings=settings)
        assert (await Runner.run(typed, "Who is it?")).final_output.name in ("Ann", "Bob")
        forced = ModelSettings(max_tokens=90, tool_choice="required")
        tool = Agent(
            name="b", model=model, tools=[look], model_settings=forced, tool_use_behavior="stop_on_first_tool"
        )
        assert (await Runner.run(tool, "How is it?")).final_output == "rain"
    assert len(called) == 2


asyncio.run(main())
print("good")
