"""serve --simple: one question, one answer, for programs without a client of OpenAI's API. GET /query/TEXT and POST /.

Knows the two forms. Checking, waiting and answering are those of /v1/chat/completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from onecard.data.messages import Turn
from onecard.serve.api.answer_schema import UsageBody
from onecard.serve.api.parameters import check_names, close_request
from onecard.serve.api.requests import GenerationParams, ServerDefaults, common_ask
from onecard.serve.api.responses import ChatResponseBuilder
from onecard.serve.api.schema import Length, SamplingParameters
from onecard.serve.api.work import Progress
from onecard.serve.http_error import bad_request
from onecard.serve.security import QUERY

Question = Annotated[StrictStr, Field(min_length=1)]
ONE_QUESTION = {
    "oneOf": [{"required": [name], "properties": {other: {"type": "null"}}}
              for name, other in (("text", "instruction"), ("instruction", "text"))],
}  # fmt: skip


def describe(schema: dict[str, Any]) -> None:
    """Say in the OpenAPI document that one of the two is the question, and what is refused."""
    close_request(schema)
    schema |= ONE_QUESTION
    schema["properties"] |= {"stream": {"enum": [None, False]}, "n": {"enum": [None, 1]}}


class SimpleRequest(SamplingParameters):
    """POST /: a question as `text`, or as `instruction` with an `input`; sampling as in /v1/chat/completions."""

    model_config = ConfigDict(extra="allow", json_schema_extra=describe)

    model: StrictStr = ""
    text: Question | None = None
    instruction: Question | None = None
    input: StrictStr = ""
    max_tokens: Length = None


class SimpleAnswer(BaseModel):
    """The answer to one question."""

    text: str
    finish_reason: str
    usage: UsageBody


def path_question(scope: Mapping[str, Any]) -> str:
    """The text of GET /query/TEXT, of the bytes that came: what a question mark or another encoding lost is refused."""
    if scope["query_string"]:
        raise bad_request("a question mark in the text is written %3F in a path; parameters go into POST /", "text")
    try:
        path = unquote_to_bytes(scope["raw_path"]).decode()
    except UnicodeDecodeError:
        raise bad_request("the text of the path is not UTF-8; send its bytes in UTF-8, as %E4%BD%A0", "text") from None
    return path.partition(QUERY)[2]


def simple_ask(body: SimpleRequest, defaults: ServerDefaults) -> GenerationParams:
    """What a simple request asks for. Raises ApiError naming the field that cannot be served."""
    check_names(body.model_extra or {}, SimpleRequest.model_fields)
    if (body.text is None) == (body.instruction is None):
        raise bad_request("either text or instruction is needed", "text")
    for name, is_wanted in (("stream", bool(body.stream)), ("n", (body.n or 1) > 1)):
        if is_wanted:
            message = f"{name!r} is for /v1/chat/completions; here one whole answer comes back"
            raise bad_request(message, name, "unsupported_parameter")
    ask = common_ask(body, defaults, body.max_tokens)
    system = (Turn("system", defaults.system),) if defaults.system else ()
    question = body.instruction if body.text is None else body.text
    field = "instruction" if body.text is None else "text"
    return replace(ask, turns=(*system, Turn("user", question or "", body.input)), texts_field=field)


class SimpleResponseBuilder(ChatResponseBuilder):
    """The text of an answer, without the thought before it."""

    def whole(self, progress: Progress) -> dict[str, Any]:
        return {"text": self.text(progress, 0), "finish_reason": self.reason(progress, 0), "usage": progress.usage(1)}
