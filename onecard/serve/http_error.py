"""An HTTP answer that is an error, in the shape that OpenAI's clients read: {"error": {message, type, param, code}}.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Send

LONGEST_MESSAGE = 1000  # characters
NOTE_KEY = "onecard.note"  # of a scope: what is printed of its request (`api/log.py`)


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
