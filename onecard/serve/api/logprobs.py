"""Log-probabilities in OpenAI's two forms, with the text and the bytes of every token.

Knows how tokenizers spell their tokens. It does not know models or streams.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from onecard.inference.detokenize import REPLACEMENT
from onecard.inference.streamer import TokenLogprob

ANCHOR = "a"  # a text to stand before a token, so that a decoder does not drop the token's space
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """The text of each token of one tokenizer, remembered.

    "▁Hi" -> " Hi"    "Ġcat" -> " cat"    "<0xE4>" -> the byte E4, written as bytes:\\xe4    "</s>" -> "</s>"
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
        self._n_anchor = len(self._decode(self._anchor))
        self._special = set(tokenizer.all_special_ids)
        self._values = {character: value for value, character in bytes_to_unicode().items()}
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that this token adds to a text."""
        if token_id not in self._known:
            self._known[token_id] = self._bytes(token_id)
        return self._known[token_id]

    def text_of(self, token_id: int) -> str:
        """Its text; bytes that are no whole character are spelled out, so that texts stay distinct."""
        value = self.bytes_of(token_id)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def n_characters(self, token_id: int, *, is_first: bool) -> int:
        """How many characters it takes in a shown text; half a character counts where it begins, control tokens not."""
        if token_id in self._special:
            return 0
        text = self._decode([token_id]) if is_first else self.bytes_of(token_id).decode("utf-8", "replace")
        begins = self.bytes_of(token_id)[:1] >= b"\xc0"
        return len(text.replace(REPLACEMENT, "")) + (REPLACEMENT in text and begins)

    def _bytes(self, token_id: int) -> bytes:
        name = str(self._tokenizer.convert_ids_to_tokens(token_id))
        byte = BYTE_TOKEN.fullmatch(name)
        if byte:
            return bytes([int(byte[1], 16)])
        if token_id in self._special:
            return name.encode("utf-8")
        text = self._decode([*self._anchor, token_id])[self._n_anchor :]
        if REPLACEMENT in text and all(character in self._values for character in name):
            return bytes(self._values[character] for character in name)
        return text.encode("utf-8")

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def chat_logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The form of chat completions."""
    content = [
        alternative(texts, token.token_id, token.logprob)
        | {"top_logprobs": [alternative(texts, token_id, logprob) for token_id, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def alternative(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    """One token with its text, its bytes and its log-probability."""
    return {"token": texts.text_of(token_id), "logprob": finite(logprob), "bytes": list(texts.bytes_of(token_id))}


def completion_logprobs(
    texts: TokenTexts, tokens: Sequence[TokenLogprob | None], ids: Sequence[int | None], offset: int
) -> tuple[dict[str, Any], int]:
    """The form of completions, one entry per id; and where the next token begins in the text, this one at `offset`.

    An id None is a token that was generated and is not shown: its entry says so, for tools that score count entries.
    """
    body: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, token_id in zip(tokens, ids, strict=True):
        body["text_offset"].append(offset)
        body["tokens"].append("" if token_id is None else texts.text_of(token_id))
        body["token_logprobs"].append(None if token is None else finite(token.logprob))
        body["top_logprobs"].append(None if token is None else likeliest(texts, token))
        offset += 0 if token_id is None else texts.n_characters(token_id, is_first=offset == 0)
    return body, offset


def likeliest(texts: TokenTexts, token: TokenLogprob) -> dict[str, float]:
    """Text -> log-probability of the likeliest tokens; where any were asked for, the token itself is among them."""
    top = {texts.text_of(token_id): finite(logprob) for token_id, logprob in token.top}
    return {texts.text_of(token.token_id): finite(token.logprob)} | top if top else top


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999.0 for what cannot be."""
    return logprob if logprob > -9999.0 else -9999.0
