"""A fast tokenizer made able to tokenise a text that goes on from another one.

SentencePiece and its relatives put a space in front of a text, because a text begins a word. A text cut into segments
would get one at every cut: "Sure" behind "[/INST] " becomes `▁ ▁Sure` where Hugging Face reads `▁Sure`. The copy made
here puts none in front of a text that begins with MARK. Everything else it does as the original does: with other texts,
and with what follows an added token inside a text.

Knows the steps of Hugging Face's `tokenizers`, in their serialised form. Does not know segments or templates.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

# A noncharacter: Unicode promises that it never stands for anything in a text.
MARK = "\ufdd0"
_BY_WHITESPACE = ("WhitespaceSplit", "Whitespace", "BertPreTokenizer")


class ContinuationTokenizer(NamedTuple):
    """backend: the copy. after_tokens: the original puts no space after an added token either. by_words: it puts one
    in front of every word, so that a text behind whitespace is no continuation for it."""

    backend: Any
    after_tokens: bool
    by_words: bool


def continuing(backend: Any) -> ContinuationTokenizer | None:
    """The copy of a `tokenizers.Tokenizer`, or None where nothing is ever put in front of a text."""
    state = json.loads(backend.to_str())
    steps = list(_steps(state["normalizer"])) + list(_steps(state["pre_tokenizer"]))
    words = _pre_tokenizer(state["pre_tokenizer"])
    if words != state["pre_tokenizer"]:
        state["pre_tokenizer"] = words
    elif any(step["type"] == "Prepend" for step in steps):
        state["normalizer"] = _normalizer(state["normalizer"])
    else:
        return None
    state["padding"] = state["truncation"] = None  # left behind by somebody's last call
    only_first = all(
        step["type"] != "Prepend" and step.get("prepend_scheme") != "always" and not step.get("add_prefix_space")
        for step in steps
    )
    by_words = any(step["type"] in _BY_WHITESPACE for step in steps)
    return ContinuationTokenizer(type(backend).from_str(json.dumps(state)), only_first, by_words)


def _steps(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, with sequences laid flat."""
    if node is None:
        return []
    inner = node.get("normalizers") or node.get("pretokenizers")
    return [step for part in inner for step in _steps(part)] if inner else [node]


def _pre_tokenizer(node: dict[str, Any] | None) -> dict[str, Any] | None:
    """With a step behind each one that puts a space in front, which takes the mark and this space away again."""
    if node is None:
        return None
    if node["type"] == "Sequence":
        return {**node, "pretokenizers": [_pre_tokenizer(part) for part in node["pretokenizers"]]}
    if node["type"] == "Metaspace" and node["prepend_scheme"] != "never":
        return _sequence(node, _without(node["replacement"]))
    if node["type"] == "ByteLevel" and node["add_prefix_space"]:
        # The space comes before the words are cut, and the mark must be gone by then.
        space = {"type": "Metaspace", "replacement": " ", "prepend_scheme": "always", "split": False}
        return _sequence(space, _without(" "), {**node, "add_prefix_space": False})
    return node


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _without(space: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"String": space + MARK}, "behavior": "Removed", "invert": False}


def _normalizer(node: dict[str, Any]) -> dict[str, Any]:
    if node["type"] == "Sequence":
        return {**node, "normalizers": [_normalizer(part) for part in node["normalizers"]]}
    if node["type"] != "Prepend":
        return node
    removed = {"type": "Replace", "pattern": {"String": node["prepend"] + MARK}, "content": ""}
    return {"type": "Sequence", "normalizers": [node, removed]}
