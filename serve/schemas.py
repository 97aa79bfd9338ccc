"""Bodies of requests, as OpenAI's API defines them. Wrong types and unknown fields are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serve.fields import FewEntries, Integer, ListOf, OneOf, Stop

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_BIASES = 1024
MAX_TOOLS = 128

Count = Annotated[Integer, Field(ge=1, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Part(BaseModel):
    """What stands inside a body: further keys are read over, as clients echo what they were sent."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Body(BaseModel):
    """A whole body. ``fields.py`` says what becomes of fields that stand in no model."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    model: str | None = None


class StreamOptions(Part):
    include_usage: bool | None = None


class SamplingFields(Body):
    """What every way of generating shares."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Integer | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Bias], FewEntries(MAX_BIASES)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    n: Integer | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None


class CompletionBody(SamplingFields):
    prompt: Annotated[
        str | ListOf[str] | TokenIds | ListOf[TokenIds],
        OneOf("text, token ids, or a list of either"),
    ]
    max_tokens: Integer | None = Field(None, ge=0, le=MAX_TOKENS)
    echo: bool | None = None
    logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: Integer | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None


class TextPart(Part):
    type: str
    text: str | None = None


Content = Annotated[str | ListOf[TextPart], OneOf("text or a list of parts")]


class ToolCallFunction(Part):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Part):
    id: str | None = None
    type: Literal["function"] = "function"
    function: ToolCallFunction


class Message(Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: str | None = None


Messages = Annotated[ListOf[Message], Field(min_length=1)]


class ToolFunction(Part):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[ListOf[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    OneOf("'none', 'auto', 'required' or a function of tools"),
]


class JsonSchemaFormat(Part):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ChatBody(SamplingFields):
    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], FewEntries(64)] | None = None


def _typed(item: Any) -> Any:
    """An input item without a type is a message; its role says so."""
    return {"type": "message", **item} if isinstance(item, dict) and "role" in item else item


class InputMessage(Part):
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class InputCall(Part):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str | None = None


class InputResult(Part):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class InputReasoning(Part):
    """Thoughts that a client sends back; the model is not shown them."""

    type: Literal["reasoning"]


InputItem = Annotated[
    InputMessage | InputCall | InputResult | InputReasoning,
    Field(discriminator="type"),
    BeforeValidator(_typed),
]


class FunctionTool(Part):
    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Part):
    type: Literal["function"]
    name: str


class TextFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Part):
    format: TextFormat | None = None


class ResponsesBody(Body):
    input: Annotated[
        str | Annotated[ListOf[InputItem], Field(min_length=1)], OneOf("text or a list of items")
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    text: TextSettings | None = None
    tools: Annotated[ListOf[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Annotated[
            Literal["none", "auto", "required"] | NamedFunctionTool,
            OneOf("'none', 'auto', 'required' or a function of tools"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None


class TokenizeBody(Body):
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
