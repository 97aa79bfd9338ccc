"""LangChain on a local endpoint: a prompt template, streamed.

pip install langchain-openai; then: python examples/langchain_chat.py [http://127.0.0.1:8000]
"""

import os
import sys

import openai
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
endpoint = {"base_url": f"{url}/v1", "api_key": os.environ.get("EDGE_API_KEY", "none")}
name = openai.OpenAI(**endpoint).models.list().data[0].id

model = ChatOpenAI(**endpoint, model=name, temperature=0, max_tokens=64)
prompt = ChatPromptTemplate.from_messages(
    [("system", "Answer in one sentence."), ("user", "What is {thing} for?")]
)

for piece in (prompt | model).stream({"thing": "a compass"}):
    print(piece.content, end="", flush=True)
print()
