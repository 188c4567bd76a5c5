"""Bodies and answers of the studio's own API: bounded JSON in, JSON or an error in the kit's form out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from onecard.errors import ConfigError, OneCardError
from onecard.serve.http_error import ApiError, bad_request, printable
from onecard.translation import LANGUAGES, translated

MOST_JSON_BYTES = 1_000_000
LANGUAGE_HEADER = "x-language"  # of the page, which need not be that of the terminal


class StudioJson(JSONResponse):
    """JSON that no cache keeps; NaN and infinity, which JSON has not, become null."""

    def __init__(self, content: Any, status_code: int = 200) -> None:
        super().__init__(finite(content), status_code, {"cache-control": "no-store"})


def route(path: str, work: Callable[[Request], Any], method: str = "GET") -> Route:
    """A path that is answered with what `work` gives, in a thread."""

    def endpoint(request: Request) -> Response:
        return StudioJson(work(request))

    return Route(path, endpoint, methods=[method])


def json_route(
    path: str, work: Callable[[Request, dict[str, Any]], Any], *required: str, status: int = 200, method: str = "POST"
) -> Route:
    """A path that takes a JSON object with these keys and is answered with what `work` makes of it, in a thread."""

    async def endpoint(request: Request) -> Response:
        body = await json_body(request, *required)
        return StudioJson(await run_in_threadpool(work, request, body), status)

    return Route(path, endpoint, methods=[method])


async def json_body(request: Request, *required: str) -> dict[str, Any]:
    """The JSON object of a request of at most `MOST_JSON_BYTES`, with these keys. Raises ApiError.

    Asking for application/json keeps forms of foreign pages out, which browsers send without asking before.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with Content-Type: application/json", code="not_json")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_JSON_BYTES:
            raise ApiError(413, f"the body is larger than {MOST_JSON_BYTES} bytes", code="body_too_large")
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair, which no file and no answer can hold
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON", code="not_json") from None
    if not isinstance(content, dict):
        raise bad_request("the body must be a JSON object", code="not_json")
    for key in required:
        if key not in content:
            raise bad_request(f"{key} is missing", key)
    return content


def answer_error(request: Request, reason: Exception) -> Response:
    """Any error as JSON: {"error": {message, type, param, code, problems}}; problems are [flag, text]."""
    to = language_of(request)
    problems: list[tuple[str, str]] = []
    if isinstance(reason, ApiError):
        error = reason
    elif isinstance(reason, OneCardError):
        is_wrong_setting = isinstance(reason, ConfigError)
        problems = list(reason.problems) if isinstance(reason, ConfigError) else []
        error = ApiError(400 if is_wrong_setting else 409, str(reason), param=getattr(reason, "flag", None) or None)
    elif isinstance(reason, HTTPException):
        error = ApiError(reason.status_code, str(reason.detail))
    else:
        error = ApiError(500, f"{type(reason).__name__}: {reason}", code="unforeseen")
    body = error.body
    body["error"]["message"] = printable(translated(error.message, to))
    body["error"]["problems"] = [[flag, printable(translated(text, to))] for flag, text in problems]
    return StudioJson(body, error.status_code)


def language_of(request: Request) -> str:
    """en or zh, as the page says."""
    named = request.headers.get(LANGUAGE_HEADER, "en")
    return named if named in LANGUAGES and named != "auto" else "en"


def in_language(value: Any, language: str) -> Any:
    """The same with every text in it as a message of that language; what is no message stays."""
    if isinstance(value, str):
        return translated(value, language)
    return [in_language(each, language) for each in value] if isinstance(value, (list, tuple)) else value


def finite(content: Any) -> Any:
    """The same with None for numbers that JSON cannot write."""
    if isinstance(content, float):
        return content if content - content == 0 else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    return [finite(value) for value in content] if isinstance(content, (list, tuple)) else content
