"""Questions to an OpenAI-compatible endpoint, each tried a bounded number of times.

What passes by itself (429, 500 to 504, a broken connection, an answer that is no JSON) is waited for and tried again;
what does not (401, 404, an unknown model) ends the run with the server's own words. The key comes from an environment
variable, goes to the host that was named only, and is never shown.

Knows HTTP. Does not know what is asked.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from onecard.config.addresses import endpoint_address
from onecard.console import first_line, say
from onecard.data.values import safe
from onecard.errors import OneCardError

_PASSING = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
_LONGEST_WAIT_S = 300.0
_LARGEST_ANSWER = 16 * 2**20
URL_FLAG, KEY_FLAG = "--base_url", "--api_key_env"


class EndpointError(OneCardError):
    """The endpoint cannot be asked, now or at all; what was answered before is kept."""


class EndpointAnswer(NamedTuple):
    """What the model wrote; `thought` is what a reasoning server gives apart. Token counts are 0 where untold."""

    text: str
    thought: str
    is_whole: bool
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class EndpointSettings:
    """Where and how to ask; the fields are options of `onecard data make`."""

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.7
    max_tokens: int = 2048
    timeout_s: float = 300.0
    max_attempts: int = 6


class Endpoint:
    """A client that asks one question at a time; a context manager that closes its connections.

    wait: how seconds are waited. Raises ConfigError for an address that is none.
    """

    def __init__(self, settings: EndpointSettings, wait: Callable[[float], None] = time.sleep) -> None:
        self._settings, self._wait = settings, wait
        ending = "/chat/completions"
        self._url = endpoint_address(URL_FLAG, settings.base_url, ending) + ending
        self._key = os.environ.get(settings.api_key_env, "") if settings.api_key_env else ""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=settings.timeout_s, follow_redirects=False)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, messages: list[dict[str, str]], seed: int = 0) -> EndpointAnswer:
        """The answer to these messages. Raises EndpointError after the last try, or at once where none would help."""
        body = {
            "model": self._settings.model,
            "messages": messages,
            "temperature": self._settings.temperature,
            "max_tokens": self._settings.max_tokens,
            "seed": seed,
        }
        problem = ""
        for attempt in range(1, self._settings.max_attempts + 1):
            answer, problem, asked_s = self._try(body)
            if answer is not None:
                return answer
            wait_s = asked_s if asked_s is not None else min(_LONGEST_WAIT_S, 2.0 ** (attempt - 1))
            if attempt < self._settings.max_attempts:
                say(f"{problem}; trying again in {wait_s:.0f} s ({attempt} of {self._settings.max_attempts})")
                self._wait(wait_s)
        raise EndpointError(
            f"{self._url} did not answer in {self._settings.max_attempts} tries; the last: {problem}. "
            "What was made is kept: start the same command again to go on"
        )

    def _try(self, body: dict[str, Any]) -> tuple[EndpointAnswer | None, str, float | None]:
        """(answer, why there is none, seconds the server asks to wait). Raises EndpointError where a retry is idle."""
        try:
            status, headers, content = self._post(body)
        except httpx.HTTPError as reason:
            return None, f"{type(reason).__name__}: {first_line(reason)}", None
        if status in _PASSING:
            return None, f"HTTP {status}: {self._shown(content)}", _asked_to_wait(headers)
        if status != 200:
            raise EndpointError(self._refusal(status, content))
        answer = _answer_in(content)
        return answer, f"the answer is no chat completion in JSON: {self._shown(content)}", None

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body, all within the time limit, however slowly the bytes come."""
        ends_at = time.monotonic() + self._settings.timeout_s
        with self._client.stream("POST", self._url, json=body) as response:
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if len(content) > _LARGEST_ANSWER:
                    raise httpx.ReadError(f"the answer is longer than {_LARGEST_ANSWER // 2**20} MiB")
                if time.monotonic() > ends_at:
                    raise httpx.ReadTimeout(f"the answer was not whole after {self._settings.timeout_s:g} s")
            return response.status_code, response.headers, bytes(content)

    def _shown(self, content: bytes) -> str:
        """What a server said, short, printable, and without the key."""
        text = content.decode("utf-8", "replace")
        try:
            reply = json.loads(text)
            error = reply.get("error", reply)
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError, RecursionError):
            pass
        return safe(text.replace(self._key, "***") if self._key else text, 300) or "nothing"

    def _refusal(self, status: int, content: bytes) -> str:
        said = f"{self._url} answered HTTP {status}: {self._shown(content)}"
        if status in (401, 403):
            variable = self._settings.api_key_env
            state = "is not the right one" if self._key else "is empty"
            return f"{said}; the key in the environment variable {variable} {state} ({KEY_FLAG} names another)"
        if status == 404:
            return f"{said}; check {URL_FLAG} (it ends before /chat/completions, mostly with /v1) and the model's name"
        if 300 <= status < 400:
            return f"{said}; the server leads elsewhere: give that address as {URL_FLAG}"
        return said


def _asked_to_wait(headers: httpx.Headers) -> float | None:
    """Seconds of Retry-After, at most five minutes; None where there is none that is a number."""
    text = headers.get("retry-after", "")
    return min(_LONGEST_WAIT_S, float(text)) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _answer_in(content: bytes) -> EndpointAnswer | None:
    """The first choice of a chat completion, or None where the bytes are none."""
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        message = choice["message"]
        text, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
        usage = reply.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        is_whole = choice.get("finish_reason") != "length"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    if not isinstance(text, str) or not isinstance(thought, str):
        return None
    return EndpointAnswer(text, thought, is_whole, *tokens)
