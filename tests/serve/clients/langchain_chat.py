"""langchain: ChatOpenAI with structured output and tools, over both APIs."""

import os
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Person(BaseModel, extra="forbid"):
    """Somebody."""

    name: Literal["Ann", "Bob"]


for responses in (False, True):
    chat = ChatOpenAI(model=os.environ["MODEL"], max_tokens=90, use_responses_api=responses, max_retries=0)
    for method in ("function_calling", "json_schema"):
        person = chat.with_structured_output(Person, method=method).invoke("Who is it?")
        assert isinstance(person, Person), (responses, method)
    (call,) = chat.bind_tools([Person], tool_choice="Person").invoke("Who is it?").tool_calls
    assert call["name"] == "Person"
    assert list(chat.bind(max_tokens=16).stream("hello"))
print("good")
