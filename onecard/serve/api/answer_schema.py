"""The bodies of answers, as models that describe themselves in the OpenAPI document; those of requests: `schema.py`.

Names and types are OpenAI's (https://platform.openai.com/docs/api-reference), with additions of this server's.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from onecard.serve.api.schema import ToolCallBody


class PromptTokensDetails(BaseModel):
    """Tokens of the prompt that were not read anew, because the request before began alike."""

    cached_tokens: int


class UsageBody(BaseModel):
    """Tokens; with several choices the prompt counts once and the answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Alternative(BaseModel):
    """A token that could have stood there. `bytes` are those of its text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenInfo(Alternative):
    """A token of the answer."""

    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    """Log-probabilities in the form of chat."""

    content: list[TokenInfo]
    refusal: None = None


class ChatAnswer(BaseModel):
    """What the assistant said."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallBody] | None = None


class Choice(BaseModel):
    """What every choice has."""

    index: int


class WrittenAnswer(BaseModel):
    """What stands at the top of every answer that was generated, and what it took."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBody
    # path: how it was computed, with --max_parallel; sources: what an answer out of documents was shown
    onecard: dict[str, Any] | None = None


class ChatChoice(Choice):
    """One of `n` answers."""

    finish_reason: Literal["stop", "length", "tool_calls"]
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None


class ChatCompletion(WrittenAnswer):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the form of completions; all four lists have one entry per token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Choice):
    """One of `n` continuations of one prompt."""

    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None = None


class Completion(WrittenAnswer):
    """The answer of /v1/completions."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ResponseUsage(BaseModel):
    """Tokens, as /v1/responses names them."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseBody(BaseModel):
    """The answer of /v1/responses: `output` holds a message, before it perhaps what was thought."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    error: None = None
    incomplete_details: dict[str, str] | None
    output: list[dict[str, Any]]
    usage: ResponseUsage


class Embedding(BaseModel):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The answer of /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    """A name that `model` may have."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "onecard"


class ModelList(BaseModel):
    """The answer of /v1/models; the first is the one the server was started with."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The answer of /health."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field that is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail
