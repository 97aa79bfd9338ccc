"""The official client against a local endpoint: an answer, a stream, JSON by a schema.

pip install openai; then: python examples/openai_client.py [http://127.0.0.1:8000]
"""

import json
import os
import sys

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("EDGE_API_KEY", "none"))
model = client.models.list().data[0].id

question = [{"role": "user", "content": "What is the capital of France?"}]
answer = client.chat.completions.create(model=model, messages=question, max_tokens=32, temperature=0)
print("answer:", answer.choices[0].message.content)

print("stream: ", end="")
for chunk in client.chat.completions.create(model=model, messages=question, max_tokens=32, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "country": {"type": "string", "maxLength": 30},
    },
    "required": ["city", "country"],
    "additionalProperties": False,
}
structured = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Name a city and its country."}],
    max_tokens=200,
    response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
)
print("JSON:", json.loads(structured.choices[0].message.content))
