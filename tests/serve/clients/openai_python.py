"""openai (Python): parsed formats, tools and streams of both APIs."""

import json
import os
from typing import Literal

import openai
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
client = openai.OpenAI(max_retries=0)


class Person(BaseModel, extra="forbid"):
    name: Literal["Ann", "Bob"]
    old: bool


question = [{"role": "user", "content": "Who is it?"}]
parsed = client.chat.completions.parse(model=MODEL, messages=question, response_format=Person)
assert isinstance(parsed.choices[0].message.parsed, Person)
response = client.responses.parse(model=MODEL, input="Who is it?", text_format=Person)
assert isinstance(response.output_parsed, Person)

tool = openai.pydantic_function_tool(Person)
reply = client.chat.completions.create(
    model=MODEL, messages=question, tools=[tool], tool_choice="required", parallel_tool_calls=False
)
(call,) = reply.choices[0].message.tool_calls
assert json.loads(call.function.arguments)["name"] in ("Ann", "Bob")
with client.chat.completions.stream(model=MODEL, messages=question, max_completion_tokens=5) as stream:
    assert list(stream)[-1].type
print("good")
