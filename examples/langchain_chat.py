"""LangChain on a local endpoint.

pip install langchain-openai; then: python examples/langchain_chat.py
"""

import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    base_url="http://127.0.0.1:8000/v1",
    api_key=os.environ.get("EDGE_API_KEY", "none"),
    model=os.environ.get("MODEL"),  # the name in /v1/models; `compress serve` prints it
    temperature=0,
    max_tokens=64,
)
prompt = ChatPromptTemplate.from_messages(
    [("system", "Answer in one sentence."), ("user", "What is {thing} for?")]
)

for piece in (prompt | model).stream({"thing": "a compass"}):
    print(piece.content, end="", flush=True)
print()
