"""Which of our errors has which HTTP status, in the words that OpenAI's clients understand.

Knows errors of the engine. It does not know paths, requests or models.
"""

from __future__ import annotations

import traceback
from pathlib import PurePath

from onecard.console import warn
from onecard.errors import ConfigError, DataError, OneCardError
from onecard.inference.engine import ContextTooLong, OutOfMemory
from onecard.inference.queue import QueueFull
from onecard.serve.http_error import ApiError, bad_request

# Options of ours -> what a request calls them.
FIELDS = {"min_new_tokens": "min_tokens", "adapter": "model"}


def as_api_error(reason: BaseException, text_field: str = "messages", tokens_field: str = "max_tokens") -> ApiError:
    """What a client is told of an error; the fields are the request's that hold its texts and its longest answer.

    What a client must not or need not know is printed here instead.
    """
    if isinstance(reason, ApiError):
        return reason
    if isinstance(reason, QueueFull):
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
