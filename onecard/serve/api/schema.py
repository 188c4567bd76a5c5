"""The bodies of requests, as models that check themselves and describe themselves in the OpenAPI document.

Names, types and bounds are OpenAI's (https://platform.openai.com/docs/api-reference), with additions of this
server's. Does not know what a value does to an answer (`requests.py`) or which limits the server was started with.
Those of answers are in `answer_schema.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    FailFast,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)

from onecard.serve.api.parameters import CACHE_MARKS, close_message, close_request

MOST_ALTERNATIVES = 20
MOST_STOPS = 16
LONGEST_STOP = 1000  # characters
BIGGEST = 2**31 - 1
TOOL_CHOICES = ("none", "auto", "required")

TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}}
    | {name: {"description": "Changes nothing.", "type": ["object", "null"]} for name in CACHE_MARKS},
    "required": ["type", "text"],
    "additionalProperties": False,
}
CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART, "minItems": 1}]}
NO_CONTENT = {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]}
TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        TOKEN_IDS,
        {"type": "array", "items": TOKEN_IDS, "minItems": 1},
    ]
}
STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
STOPS = {"type": "array", "items": STOP_TEXT, "maxItems": MOST_STOPS}
STOP = {"anyOf": [STOP_TEXT | {"minLength": 0}, STOPS, {"type": "null"}]}
MOST_BIAS = 100
BIASES = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
}
NAMED_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
SCHEMA_OR_TEXT = {"type": ["object", "boolean", "string", "null"]}
RESPONSE_FORMAT = {
    "type": ["object", "null"],
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
    "required": ["type"],
}
LOGIT_BIAS = {"anyOf": [BIASES, {"type": "array", "maxItems": 0}, {"type": "null"}]}

NO_LIMIT = -1  # as llama.cpp and the programs that are made for it say it


def none_if_unlimited(value: Any) -> Any:
    """-1, by which clients ask for as many tokens as there may be, means what a field means that is left out."""
    return None if type(value) is int and value == NO_LIMIT else value


def length_schema(least: int) -> WithJsonSchema:
    """Of a number of tokens, with the value that asks for no limit."""
    bounded = {"type": "integer", "minimum": least, "maximum": BIGGEST}
    return WithJsonSchema({"anyOf": [bounded, {"const": NO_LIMIT}, {"type": "null"}]})


Unlimited = BeforeValidator(none_if_unlimited)
LengthOrZero = Annotated[Annotated[StrictInt, Field(ge=0, le=BIGGEST)] | None, Unlimited, length_schema(0)]
Length = Annotated[Annotated[StrictInt, Field(ge=1, le=BIGGEST)] | None, Unlimited, length_schema(1)]


def describe_message(schema: dict[str, Any]) -> None:
    """Say in the OpenAPI document who may be without content, who calls, and who tells a result."""
    close_message(schema)
    of_assistant = {"properties": {"role": {"const": "assistant"}, "tool_call_id": {"type": "null"}}}
    others = {"role": {"not": {"const": "assistant"}}, "content": CONTENT, "tool_calls": NO_CONTENT}
    schema["anyOf"] = [of_assistant, {"properties": others, "required": ["content"]}]
    of_tool = {"properties": {"role": {"const": "tool"}}}
    schema["allOf"] = [{"anyOf": [of_tool, {"properties": {"tool_call_id": {"type": "null"}}}]}]


class FunctionCall(BaseModel):
    """Which function is called; `arguments` is a JSON object as text."""

    model_config = {"extra": "forbid"}

    name: Annotated[StrictStr, Field(min_length=1)]
    arguments: StrictStr


class ToolCallBody(BaseModel):
    """A call that an answer makes. Clients that join a stream may keep the index of its pieces."""

    model_config = {"extra": "forbid"}

    id: StrictStr
    type: Literal["function"]
    function: FunctionCall
    index: StrictInt | None = None


class FunctionDefinition(BaseModel):
    """A function that may be called; `parameters` is a JSON schema."""

    model_config = {"extra": "forbid"}

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    """A tool that may be called."""

    model_config = {"extra": "forbid"}

    type: Literal["function"]
    function: FunctionDefinition


class Message(BaseModel):
    """One message of the conversation. Contents are texts; several text parts are joined.

    Only an assistant's message may be without content, call tools, and have thoughts (`reasoning_content`, which others
    call `reasoning`); only a tool's tells the result of a call. A name is told to templates that read it.
    """

    model_config = {"extra": "allow", "json_schema_extra": describe_message}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, WithJsonSchema({"anyOf": [CONTENT, NO_CONTENT]})] = None
    name: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: StrictStr | None = None
    cache_control: dict[str, Any] | None = None


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    model_config = {"extra": "forbid"}

    include_usage: StrictBool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class ServiceParameters(BaseModel):
    """Besides the model: what is said to the books, queues and caches of other services, and changes no answer."""

    model: StrictStr
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    service_tier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: StrictStr | None = None
    cache_control: dict[str, Any] | None = None
    cache_prompt: StrictBool | None = None
    cache_salt: StrictStr | None = None
    request_id: StrictStr | None = None


class AnswerParameters(ServiceParameters):
    """How an answer is chosen and sent, in all three forms; what is left out is as the server was started."""

    temperature: Annotated[StrictFloat, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=BIGGEST)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Any, WithJsonSchema(STOP)] = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None


class SamplingParameters(AnswerParameters):
    """What chat and completions share; some of it is vLLM's and llama.cpp's: what the answer is held to."""

    max_tokens: LengthOrZero = None
    n: Annotated[StrictInt, Field(ge=1, le=BIGGEST)] | None = None
    logit_bias: Annotated[Any, WithJsonSchema(LOGIT_BIAS)] = None
    repetition_penalty: Annotated[StrictFloat, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    num_beams: Annotated[StrictInt, Field(ge=1, le=BIGGEST)] | None = None
    no_repeat_ngram_size: Annotated[StrictInt, Field(ge=0, le=BIGGEST)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=BIGGEST)] | None = None
    response_format: Annotated[Any, WithJsonSchema(RESPONSE_FORMAT)] = None
    structured_outputs: Annotated[Any, WithJsonSchema({"type": ["object", "null"]})] = None
    guided_json: Annotated[Any, WithJsonSchema(SCHEMA_OR_TEXT)] = None
    guided_regex: StrictStr | None = None
    guided_choice: Annotated[Any, WithJsonSchema({"type": ["array", "null"], "items": {"type": "string"}})] = None
    guided_grammar: StrictStr | None = None
    json_schema: Annotated[Any, WithJsonSchema(SCHEMA_OR_TEXT)] = None
    grammar: StrictStr | None = None


class ChatRequest(SamplingParameters):
    """POST /v1/chat/completions."""

    model_config = {"extra": "allow", "json_schema_extra": close_request}

    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: Length = None
    max_tokens: Length = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"enum": [None, *TOOL_CHOICES]}, NAMED_TOOL]})] = None
    parallel_tool_calls: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None


class CompletionRequest(SamplingParameters):
    """POST /v1/completions."""

    model_config = {"extra": "allow", "json_schema_extra": close_request}

    prompt: Annotated[Any, WithJsonSchema(PROMPT)]
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: StrictBool | None = None


class TextOptions(BaseModel):
    """The form of a response's text."""

    model_config = {"extra": "forbid"}

    format: Annotated[Any, WithJsonSchema(RESPONSE_FORMAT)] = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(BaseModel):
    """How much is thought before a response; there are no summaries of it."""

    model_config = {"extra": "forbid"}

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponseRequest(AnswerParameters):
    """POST /v1/responses, for texts: nothing is kept here, so there is nothing to go on with."""

    model_config = {"extra": "allow", "json_schema_extra": close_request}

    input: Annotated[Any, WithJsonSchema({"type": ["string", "array"], "minItems": 1})]
    instructions: StrictStr | None = None
    prompt: None = None  # a template that OpenAI keeps
    max_output_tokens: Length = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class EmbeddingRequest(ServiceParameters):
    """POST /v1/embeddings."""

    model_config = {"extra": "allow", "json_schema_extra": close_request}

    input: Annotated[Any, WithJsonSchema(PROMPT)]
    encoding_format: Literal["float", "base64"] | None = None
