"""llama-index: OpenAILike, whole and streamed, chat and completion, with functions."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model=os.environ["MODEL"],
    api_base=os.environ["OPENAI_BASE_URL"],
    api_key="unused",
    is_chat_model=True,
    is_function_calling_model=True,
    max_tokens=4,
    context_window=512,
)
turns = [ChatMessage(role="user", content="hello")]
assert llm.chat(turns).raw.usage.completion_tokens == 4
assert list(llm.stream_chat(turns))
assert llm.complete("hello").raw.usage.completion_tokens == 4
print("good")
