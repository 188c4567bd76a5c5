"""/tokenize and /detokenize in vLLM's form: what a prompt or a conversation becomes for the model, and the way back.

Knows the engine's prompts. It does not know paths or how answers are generated.
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#tokenizer-api
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, FailFast, Field, StrictBool, StrictInt, StrictStr
from starlette.concurrency import run_in_threadpool

from onecard.inference.detokenize import decode
from onecard.inference.engine import InferenceEngine
from onecard.serve.api.prompt_template import for_template
from onecard.serve.api.requests import ServerDefaults, chat_ask
from onecard.serve.api.schema import BIGGEST, ChatRequest, Message, Tool
from onecard.serve.api.work import blaming, token_ids
from onecard.serve.http_error import bad_request

ONE_PROMPT: dict[str, Any] = {
    "required": ["prompt"],
    "properties": {"prompt": {"type": "string"}, "messages": {"maxItems": 0}},
}
ONE_CHAT: dict[str, Any] = {
    "required": ["messages"],
    "properties": {"prompt": {"type": "null"}, "messages": {"minItems": 1}},
}
OF_CHAT = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


class TokenizeRequest(BaseModel):
    """POST /tokenize: a prompt as /v1/completions reads it, or messages as /v1/chat/completions does."""

    model_config = {"extra": "forbid", "json_schema_extra": {"oneOf": [ONE_PROMPT, ONE_CHAT]}}

    model: StrictStr
    prompt: StrictStr | None = None
    messages: Annotated[list[Message], FailFast()] = []
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: StrictBool | None = None


class Tokens(BaseModel):
    """The answer of /tokenize; `max_model_len` counts prompt and answer together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = {"extra": "forbid"}

    model: StrictStr
    tokens: list[Annotated[StrictInt, Field(ge=0, le=BIGGEST)]]


class Detokenized(BaseModel):
    """The answer of /detokenize, control tokens included."""

    prompt: str


async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The token ids of a prompt or a conversation."""
    app: Any = request.app
    app.check_model(body.model)
    return JSONResponse(await run_in_threadpool(tokens_of, app.engine, body, app.defaults))


async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids."""
    app: Any = request.app
    app.check_model(body.model)
    return JSONResponse(await run_in_threadpool(text_of_tokens, app.engine, body))


def tokens_of(engine: InferenceEngine, body: TokenizeRequest, defaults: ServerDefaults) -> dict[str, Any]:
    """The body of an answer. Raises ApiError naming the field that cannot be served."""
    if (body.prompt is None) == (not body.messages):
        raise bad_request("either a prompt or messages are needed", "prompt")
    tokenizer = engine.tokenizer(body.model)
    if body.prompt is None:
        ids = chat_ids(engine, body, defaults)
    else:
        if wrong := [name for name in OF_CHAT if getattr(body, name) is not None]:
            raise bad_request(f"{wrong[0]} goes with messages", wrong[0])
        if body.add_special_tokens is False:
            ids = tokenizer(body.prompt, add_special_tokens=False)["input_ids"]
        else:
            ids = list(token_ids(engine, body.model, body.prompt))
    texts = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.context_limit, "tokens": ids, "token_strs": texts}


def chat_ids(engine: InferenceEngine, body: TokenizeRequest, defaults: ServerDefaults) -> list[int]:
    """What /v1/chat/completions would feed the model for these messages."""
    if body.add_special_tokens:
        message = "the prompt template writes all special tokens of a conversation; leave it out"
        raise bad_request(message, "add_special_tokens")
    chat = {name: getattr(body, name) for name in ("model", "messages", *OF_CHAT)}
    ask = for_template(chat_ask(ChatRequest(**chat), defaults), engine.template(body.model))
    with blaming("messages"):
        return engine.prompt_ids(ask)


def text_of_tokens(engine: InferenceEngine, body: DetokenizeRequest) -> dict[str, Any]:
    """The body of an answer. Raises ApiError for ids that the tokenizer does not have."""
    tokenizer = engine.tokenizer(body.model)
    n_known = len(tokenizer)
    if unknown := [token_id for token_id in body.tokens if token_id >= n_known]:
        raise bad_request(f"there is no token {unknown[0]} (0 to {n_known - 1})", "tokens")
    return {"prompt": decode(body.tokens, tokenizer, hidden=frozenset())}
