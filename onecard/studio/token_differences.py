"""How much likelier each token of an answer has become by training: log p(tuned) - log p(base), token by token.

Asks a server of the kit's own (`onecard serve`) that holds both models. It does not know how it was started.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from onecard.serve.http_error import ApiError

SPELLED_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")  # how the API writes a token that is no whole character


@dataclass(frozen=True)
class TokenDifference:
    """A piece of an answer with the log-probabilities that two models give it, in nats.

    n_tokens: above 1 where several tokens make one character together; their log-probabilities are summed.
    """

    text: str
    tuned: float
    base: float
    n_tokens: int = 1

    @property
    def difference(self) -> float:
        """Above 0: the tuned model finds it likelier."""
        return self.tuned - self.base


async def token_differences(
    client: httpx.AsyncClient, messages: Sequence[Mapping[str, Any]], answer: str, tuned: str, base: str
) -> list[TokenDifference]:
    """The pieces of `answer` to these messages, from one forward pass of each model over the same token ids.

    The ids are those that the tuned model is trained and asked with: its prompt template, without the end of the
    answer. Raises ApiError with what the server says.
    """
    asked = {"model": tuned, "messages": [dict(message) for message in messages]}
    whole = {
        "model": tuned, "continue_final_message": True, "add_generation_prompt": False,
        "messages": [*asked["messages"], {"role": "assistant", "content": answer}],
    }  # fmt: skip
    prompt, ids = await asyncio.gather(*(_ids(client, body) for body in (asked, whole)))
    if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
        raise ApiError(400, "this prompt template writes the answer together with the question: there is nothing to "
                       "compare token by token", code="not_comparable")  # fmt: skip
    scored = await asyncio.gather(*(_scores(client, model, ids) for model in (tuned, base)))
    (texts, of_tuned), (_, of_base) = scored
    pieces = zip(texts, of_tuned, of_base, strict=True)
    return whole_characters([TokenDifference(*piece) for piece in [*pieces][len(prompt) :]])


def whole_characters(tokens: Sequence[TokenDifference]) -> list[TokenDifference]:
    """The tokens with those joined that are single bytes of a character: a page can show characters only."""
    found: list[TokenDifference] = []
    waiting, joined = b"", TokenDifference("", 0.0, 0.0, 0)
    for token in tokens:
        spelled = SPELLED_BYTES.fullmatch(token.text)
        if spelled is None and not waiting:
            found.append(token)
            continue
        waiting += bytes.fromhex(spelled[1].replace("\\x", "")) if spelled else token.text.encode("utf-8")
        joined = replace(joined, tuned=joined.tuned + token.tuned, base=joined.base + token.base,
                         n_tokens=joined.n_tokens + 1)  # fmt: skip
        try:
            text = waiting.decode("utf-8")
        except UnicodeDecodeError:
            continue
        found.append(replace(joined, text=text))
        waiting, joined = b"", TokenDifference("", 0.0, 0.0, 0)
    return [*found, replace(joined, text=waiting.decode("utf-8", "replace"))] if waiting else found


async def _ids(client: httpx.AsyncClient, body: Mapping[str, Any]) -> list[int]:
    ids: list[int] = (await _post(client, "/tokenize", body))["tokens"]
    return ids


async def _scores(client: httpx.AsyncClient, model: str, ids: Sequence[int]) -> tuple[list[str], list[float]]:
    """The texts of the tokens and their log-probabilities under a model; the first one has none and counts as 0."""
    body = {"model": model, "prompt": list(ids), "echo": True, "logprobs": 0, "max_tokens": 0}
    logprobs = (await _post(client, "/v1/completions", body))["choices"][0]["logprobs"]
    return logprobs["tokens"], [value or 0.0 for value in logprobs["token_logprobs"]]


async def _post(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Any:
    answer = await client.post(path, json=body)
    if answer.status_code != 200:
        raise ApiError(answer.status_code, message_of(answer.content), code="model_refused")
    return answer.json()


def message_of(content: bytes) -> str:
    """What a refusal of the API says."""

    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode("utf-8", "replace")[:300] or "the model's server gave no answer"
