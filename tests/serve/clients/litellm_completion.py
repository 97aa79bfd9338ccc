"""litellm: completion, a stream, a forced tool, and its bridge to the Responses API."""

import json
import os

import litellm

name = f"openai/{os.environ['MODEL']}"
base = os.environ["OPENAI_BASE_URL"]
ask = {"model": name, "messages": [{"role": "user", "content": "hello"}], "api_base": base}
assert litellm.completion(**ask, max_tokens=4).usage.completion_tokens == 4
chunks = list(litellm.completion(**ask, max_tokens=4, stream=True))
assert chunks[-1].choices[0].finish_reason == "length"
parameters = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
reply = litellm.completion(**ask, tools=[tool], tool_choice="required", max_tokens=90)
assert json.loads(reply.choices[0].message.tool_calls[0].function.arguments) == {"city": "Oslo"}
response = litellm.responses(model=name, input="hello", max_output_tokens=4, api_base=base)
assert 0 < response.usage.output_tokens <= 4
print("good")
