"""A byte-level BPE tokenizer (LLaMA 3, Qwen) that grows: its merges and its vocabulary in tokenizer.json.

Here a text is bytes, each written as one character of an alphabet of 256; words are cut by a regular expression first.
Knows tokenizer.json. Does not know which pieces are worth adding (bpe_growth.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onecard.errors import ModelError
from onecard.export.vocabulary.bpe_growth import MergeRules, VocabularyExtension, grow
from onecard.model.files import read_json

BROKEN = "\ufffd"  # what part of a character is decoded to


def candidates(new_path: Path, old: Any) -> tuple[list[str], Counter[str]]:
    """The pieces of a newly trained tokenizer that the old one could meet, in order, and why others are not."""
    from tokenizers import decoders

    content = read_json(new_path / "tokenizer.json")
    added = {token["content"] for token in content.get("added_tokens") or ()}
    decoder = decoders.ByteLevel()
    left_out: Counter[str] = Counter()
    found: list[str] = []
    for piece in sorted(content["model"]["vocab"], key=content["model"]["vocab"].get):
        reason = "special tokens of the new model" if piece in added else _unusable(decoder.decode([piece]), old)
        if reason:
            left_out[reason] += 1
        else:
            found.append(piece)
    return found, left_out


def _unusable(text: str, old: Any) -> str:
    if BROKEN in text:
        return ""  # part of a character; it stands inside a word whatever the words are
    if old.normalizer is not None and old.normalizer.normalize_str(text) != text:
        return "changed by the old tokenizer's normalisation"
    if old.pre_tokenizer is not None and len(old.pre_tokenizer.pre_tokenize_str(text)) > 1:
        return "across words as the old tokenizer cuts them"
    return ""


def grown(
    content: dict[str, Any],
    pieces: Sequence[str],
    vocab: Mapping[str, int],
    max_new: int,
    moved_on: Callable[[int], object],
) -> VocabularyExtension:
    """What to add to the old merges. Raises ModelError for a file whose merges are not pairs."""
    order: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(content["model"]["merges"]):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        if len(pair) != 2:
            raise ModelError(f"merge {rank} of the old tokenizer.json is no pair: {merge!r}; download it again")
        order.setdefault((pair[0], pair[1]), rank)
    return grow(pieces, MergeRules(order), vocab, max_new=max_new, moved_on=moved_on)


def as_listed(content: dict[str, Any], joins: Sequence[tuple[str, str]]) -> list[Any]:
    """The joins written as the old file writes its own: "a b" in older ones, ["a", "b"] in newer ones."""
    merges = content["model"]["merges"]
    as_text = bool(merges) and isinstance(merges[0], str)
    return [f"{left} {right}" if as_text else [left, right] for left, right in joins]


def write_pair(content: dict[str, Any], directory: Path) -> None:
    """vocab.json and merges.txt, which Qwen has beside tokenizer.json; old ones would contradict it."""
    vocab = json.dumps(content["model"]["vocab"], ensure_ascii=False)
    (directory / "vocab.json").write_text(vocab, encoding="utf-8", newline="\n")
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    text = "\n".join(["#version: 0.2", *lines]) + "\n"
    (directory / "merges.txt").write_text(text, encoding="utf-8", newline="\n")
