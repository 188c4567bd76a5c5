"""What went wrong, in the words and numbers that OpenAI's clients understand.

Knows the shape ``{"error": {"message", "type", "param", "code"}}`` and which of our errors has which status. It does
not know paths, requests or models. https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import PurePath
from typing import Any

from starlette.exceptions import HTTPException

from onecard.console import ConfigError, DataError, OneCardError, warn
from onecard.inference.engine import ContextTooLong, OutOfMemory
from onecard.inference.queue import Busy

LONGEST_MESSAGE = 1000  # characters
NOTE_KEY = "onecard.note"  # of a scope: what is printed of its request (`api_log.Note`)
Send = Callable[[Any], Awaitable[None]]

# Options of ours -> what a request calls them.
FIELDS = {"min_new_tokens": "min_tokens", "adapter": "model"}


class ApiError(HTTPException):
    """An answer to a client that is an error. `param` is the request's field that is to blame, such as messages[0]."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message, self.param, self.code = message, param, code
        super().__init__(status, message, dict(headers) if headers else None)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent as JSON."""
        kind = "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        elif self.status_code >= 500:
            kind = "server_error"
        error = {"message": printable(self.message), "type": kind, "param": self.param, "code": self.code}
        return {"error": error | {"param": printable(self.param) if self.param else None}}

    @property
    def json(self) -> bytes:
        return json.dumps(self.body, ensure_ascii=False).encode("utf-8")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request can never work as it is."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(reason: BaseException, text_field: str = "messages", tokens_field: str = "max_tokens") -> ApiError:
    """What a client is told of an error; the fields are the request's that hold its texts and its longest answer.

    What a client must not or need not know is printed here instead.
    """
    if isinstance(reason, ApiError):
        return reason
    if isinstance(reason, Busy):
        headers = {"retry-after": str(reason.retry_after_seconds)}
        return ApiError(429, str(reason), code="queue_full", headers=headers)
    if isinstance(reason, ContextTooLong):
        return too_long(reason, text_field)
    if isinstance(reason, OutOfMemory):
        return ApiError(503, str(reason), code="out_of_memory")
    if isinstance(reason, ConfigError):
        name = reason.flag.removeprefix("--")
        return bad_request(str(reason), tokens_field if name == "max_new_tokens" else FIELDS.get(name, name))
    if isinstance(reason, DataError):
        return bad_request(str(reason), text_field)
    if isinstance(reason, OneCardError):
        # Its text may name files of this machine.
        warn(str(reason))
        return ApiError(500, "the model could not answer; the server has printed why", code="model_error")
    warn(f"a request failed: {type(reason).__name__} at {place_of(reason)}")
    return ApiError(500, "this was not foreseen; the server has printed where it happened", code="internal_error")


def too_long(reason: ContextTooLong, text_field: str) -> ApiError:
    """400 in the words of OpenAI's, by which clients such as LiteLLM know that a shorter prompt would do."""
    message = (
        f"This model's maximum context length is {reason.limit} tokens. However, your {text_field} resulted in "
        f"{reason.n_prompt_tokens} tokens. Please reduce the length of the {text_field}."
    )
    return bad_request(message, text_field, "context_length_exceeded")


def place_of(reason: BaseException) -> str:
    """file:line where it was raised. The text of an exception may hold a prompt, so it is not told."""
    frames = traceback.extract_tb(reason.__traceback__)
    return f"{PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"


def printable(text: str) -> str:
    """The text as UTF-8 can carry it, not longer than a person reads."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "..."


async def send_error(scope: Mapping[str, Any], send: Send, error: ApiError) -> None:
    """Answer an ASGI request with this error."""
    if NOTE_KEY in scope:
        scope[NOTE_KEY].of_error(error)
    body = error.json
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
