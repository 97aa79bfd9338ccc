"""instructor: every mode that the openai client has."""

import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel

MODES = ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON", "RESPONSES_TOOLS")
CERTAIN = ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS")
"""Those in which a schema holds the reply; in the others a random model may say anything."""


class Person(BaseModel, extra="forbid"):
    name: Literal["Ann", "Bob"]


for name in MODES:
    client = instructor.from_openai(openai.OpenAI(max_retries=0), mode=getattr(instructor.Mode, name))
    question = [{"role": "user", "content": "Who is it?"}]
    limit = "max_output_tokens" if name.startswith("RESPONSES") else "max_tokens"
    try:
        person = client.chat.completions.create(
            model=os.environ["MODEL"], messages=question, response_model=Person, max_retries=0, **{limit: 90}
        )
        assert isinstance(person, Person), name
    except openai.APIError:
        raise
    except Exception as error:
        if name in CERTAIN:
            raise
        print(name, "was answered:", type(error).__name__)
print("good")
