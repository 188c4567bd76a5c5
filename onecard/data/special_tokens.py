"""The tokens that a tokenizer treats apart: named ones, added ones, and those it puts in front of every text.

Takes any tokenizer that behaves like a Hugging Face one. Does not know templates or segments.
"""

from __future__ import annotations

from typing import Any


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's named special tokens, as chat templates see them: {"bos_token": "<s>", ...}."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def added_tokens(tokenizer: Any) -> dict[int, Any]:
    """Id -> token for what is found in a text before it is tokenised; a token may have lstrip, rstrip and special."""
    return getattr(tokenizer, "added_tokens_decoder", {})


def single_token(text: str, tokenizer: Any) -> int | None:
    """The id of `text` when the tokenizer holds it as one added or special token, else None.

    "</s>" -> 2 for Llama; "<|im_end|>" -> None for Llama, which spells it with eleven ordinary tokens
    """
    ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    if len(ids) != 1:
        return None
    return ids[0] if ids[0] in added_tokens(tokenizer) or text in tokenizer.all_special_tokens else None


def beginning_ids(tokenizer: Any) -> list[int]:
    """What `tokenizer(text)` puts in front of a text, measured: [BOS] for Llama, [] for Qwen, SmolLM2 and Phi-4.

    Not `bos_token`: many tokenizers name a BOS that they never write, and their models have never seen it there.
    """
    body = tokenizer(["x"], add_special_tokens=False)["input_ids"][0]
    whole = tokenizer(["x"], add_special_tokens=True)["input_ids"][0]
    starts = [k for k in range(len(whole)) if whole[k : k + len(body)] == body]
    return list(whole[: starts[0]]) if starts else []
