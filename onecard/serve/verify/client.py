"""Requests to any server that speaks OpenAI's API: each tried a few times, all of them within one bound of time.

What a server does not offer (log-probabilities, raw prompts, token ids) is found out by asking, once, and then known.
Knows HTTP and what the answers of vLLM, SGLang, llama.cpp, llama-cpp-python, Ollama and LM Studio look like.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from onecard.config.addresses import endpoint_address
from onecard.console import first_line
from onecard.data.values import safe
from onecard.errors import OneCardError
from onecard.serve.verify.reading import N_TOP, AnswerReading, merged, plain_token

PASSING = frozenset((408, 425, 429, 502, 503, 504))
N_TRIES, WAIT_S = 3, 1.0
URL_FLAG, KEY_FLAG = "url", "--api_key"


class ServerUnusable(OneCardError):
    """The server does not answer, or not as one that speaks OpenAI's API."""


class NotOffered(Exception):
    """The server answered that it does not have this."""


class ServerClient:
    """One server; a context manager that closes its connections.

    seconds: until all is asked, in all. Raises ConfigError for an address that is none.
    """

    def __init__(
        self, url: str, api_key: str = "", *, model: str = "", seconds: float = 120.0,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        # Without /v1: http://localhost:8000/v1/ -> http://localhost:8000.
        self.root = endpoint_address(URL_FLAG, url, "/chat/completions", "/completions", "/models", "/v1")
        self.model, self._key, self._wait = model, api_key, wait
        self._seconds = seconds
        self.start_clock()
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(headers=headers, follow_redirects=False, trust_env=False)
        self._tells_logprobs = {"/v1/chat/completions": True, "/v1/completions": True}

    def start_clock(self) -> None:
        """The time for all requests begins now."""
        self._ends_at = time.monotonic() + self._seconds

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """The names that the server has, those of adapters first. Raises ServerUnusable."""
        try:
            rows = self._json("GET", "/v1/models").get("data") or []
        except NotOffered as reason:
            raise ServerUnusable(f"{self.root}/v1/models: {reason}; is this the address of an OpenAI API?") from reason
        rows = sorted((row for row in rows if isinstance(row, Mapping)), key=lambda row: not row.get("parent"))
        return [str(row["id"]) for row in rows if "id" in row]

    def chat(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> AnswerReading:
        """The greedy answer to a conversation. Raises NotOffered and ServerUnusable."""
        answer = self._answer("/v1/chat/completions", {"messages": list(messages), "max_tokens": max_tokens},
                            {"logprobs": True, "top_logprobs": N_TOP})  # fmt: skip
        choice = _first_choice(answer)
        message = choice.get("message") or {}
        text = "".join(str(message.get(key) or "") for key in ("reasoning_content", "reasoning", "content"))
        rows = (choice.get("logprobs") or {}).get("content") or []
        return _reading(answer, choice, text, *_listed(rows))

    def complete(self, prompt: list[int] | str, max_tokens: int) -> AnswerReading:
        """How a prompt goes on greedily, without a template. Raises NotOffered and ServerUnusable."""
        answer = self._answer("/v1/completions", {"prompt": prompt, "max_tokens": max_tokens}, {"logprobs": N_TOP})
        choice = _first_choice(answer)
        logprobs = choice.get("logprobs") or {}
        if logprobs.get("content"):  # llama.cpp's own server tells them as in a chat
            tokens, tops = _listed(logprobs["content"])
        else:
            tokens = logprobs.get("tokens") or []
            own = logprobs.get("token_logprobs") or []
            others = logprobs.get("top_logprobs") or [{}] * len(tokens)
            tops = [
                [(token, value), *(pair for pair in (top or {}).items() if pair[0] != token)]
                for token, value, top in zip(tokens, own, others, strict=False)
                if value is not None
            ]
        return _reading(answer, choice, str(choice.get("text") or ""), tokens, tops)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        """What the server feeds its model for a conversation, where it tells (vLLM's /tokenize); else None."""
        try:
            answer = self._json("POST", "/tokenize", {"model": self.model, "messages": list(messages)})
        except (NotOffered, ServerUnusable):
            return None
        tokens = answer.get("tokens")
        are_ids = isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens)
        return tokens if are_ids else None

    def _answer(self, path: str, body: dict[str, Any], logprobs: dict[str, Any]) -> Mapping[str, Any]:
        body = {"model": self.model, "temperature": 0, "stream": False, **body}
        if self._tells_logprobs[path]:
            try:
                return self._json("POST", path, {**body, **logprobs})
            except NotOffered:
                answer = self._json("POST", path, body)
                self._tells_logprobs[path] = False
                return answer
        return self._json("POST", path, body)

    def _json(self, method: str, path: str, body: Any = None) -> Mapping[str, Any]:
        """The answer to a request. Raises NotOffered for a refusal, ServerUnusable for what no other request mends."""
        problem = ""
        for attempt in range(N_TRIES):
            left = self._ends_at - time.monotonic()
            if left <= 0:
                break
            if attempt:
                self._wait(min(WAIT_S * attempt, left))
            try:
                response = self._client.request(method, self.root + path, json=body, timeout=max(left, 0.1))
            except httpx.ConnectError as reason:
                raise ServerUnusable(f"nothing answers at {self.root} ({first_line(reason)}); is the server started, "
                                     "and on this port?") from reason  # fmt: skip
            except httpx.HTTPError as reason:
                problem = f"{type(reason).__name__}: {first_line(reason)}"
                continue
            if response.status_code not in PASSING:
                return self._read(path, response)
            problem = f"HTTP {response.status_code}: {self._shown(response)}"
        raise ServerUnusable(f"{self.root}{path} did not answer in time ({problem or 'nothing was asked any more'}); "
                             "--max_seconds gives it longer")  # fmt: skip

    def _read(self, path: str, response: httpx.Response) -> Mapping[str, Any]:
        status = response.status_code
        if status in (401, 403):
            state = "another key than the one given is" if self._key else "a key is"
            raise ServerUnusable(f"{self.root}{path} answered HTTP {status}: {state} needed ({KEY_FLAG})")
        if 300 <= status < 400:
            raise ServerUnusable(f"{self.root}{path} leads to {response.headers.get('location', 'elsewhere')}; give "
                                 "that address")  # fmt: skip
        if response.text.lstrip()[:1] == "<" or "text/html" in response.headers.get("content-type", ""):
            raise ServerUnusable(f"{self.root}{path} answered a web page (HTTP {status}), no JSON: this is the address "
                                 "of a page or a proxy, not of an OpenAI API")  # fmt: skip
        if status != 200:
            raise NotOffered(f"HTTP {status}: {self._shown(response)}")
        try:
            answer = response.json()
        except (ValueError, RecursionError) as reason:
            raise ServerUnusable(f"{self.root}{path} answered no JSON: {self._shown(response)}") from reason
        if not isinstance(answer, Mapping) or (answer.get("error") and "choices" not in answer):
            raise NotOffered(self._shown(response))
        return answer

    def _shown(self, response: httpx.Response) -> str:
        """What a server said, short, printable, and without the key."""
        text = response.text
        return safe(text.replace(self._key, "***") if self._key else text, 300) or "nothing"


def _first_choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise NotOffered("the answer has no choices")
    return choices[0]


def _listed(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[list[tuple[Any, Any]]]]:
    """(tokens, their likeliest alternatives) in the form of chats."""
    tops = [[(one["token"], one["logprob"]) for one in (row, *(row.get("top_logprobs") or []))] for row in rows]
    return [row["token"] for row in rows], tops


def _reading(
    answer: Mapping[str, Any], choice: Mapping[str, Any], text: str, tokens: Sequence[Any],
    tops: Sequence[Sequence[tuple[Any, Any]]],
) -> AnswerReading:  # fmt: skip
    """An answer in whatever form it came; log-probabilities that are none count as missing."""
    try:
        found = [merged(list({str(token): min(float(value), 0.0) for token, value in top}.items())) for top in tops]
    except (TypeError, ValueError):
        found = []
    usage = answer.get("usage") or {}
    n_prompt = int(usage.get("prompt_tokens") or 0)
    plain = tuple(plain_token(str(token)) for token in tokens)
    return AnswerReading(text, str(choice.get("finish_reason") or ""), plain, tuple(found), n_prompt)
