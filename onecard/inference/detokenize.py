"""Token ids to text, exactly: what has been shown is never taken back, and no half character is shown.

Knows the tokenizer's decode and how tokenizers spell single bytes. It does not know when an answer ends
(`stopping.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence, Set
from typing import Any

from onecard.data.special_tokens import added_tokens

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no whole character
LONGEST_CUT_CHARACTER = 3  # bytes of a UTF-8 character that can stand there without the last one

_byte_tokens: weakref.WeakKeyDictionary[Any, Mapping[int, int]] = weakref.WeakKeyDictionary()


def decode(ids: Sequence[int], tokenizer: Any, hidden: Set[int] | None = None) -> str:
    """The exact text of these ids, without control tokens: all of the tokenizer's, or only those that are `hidden`.

    The text of a beginning, its replacement characters at the end aside, is a beginning of the text. SentencePiece's
    byte tokens need help there: its decoder gives up a whole run of bytes when one of them fits nowhere.

        <0xE4> <0xBD> <0xA0> <0xE5>   decoder alone: "����"   here: "你�"
    """
    values = _byte_values(tokenizer)
    repaired = ids if values.keys().isdisjoint(ids) else _repaired(ids, values)
    shown = list(repaired) if hidden is None else [token_id for token_id in repaired if token_id not in hidden]
    return str(tokenizer.decode(shown, skip_special_tokens=hidden is None, clean_up_tokenization_spaces=False))


def hidden_ids(tokenizer: Any, kept: Sequence[str]) -> frozenset[int] | None:
    """The ids of all control tokens but the `kept` ones; None where none of these is a control token."""
    control = {token_id for token_id, token in added_tokens(tokenizer).items() if token.special}
    control.update(tokenizer.all_special_ids)
    kept_ids = control & {tokenizer.convert_tokens_to_ids(text) for text in kept}
    return frozenset(control - kept_ids) if kept_ids - {tokenizer.unk_token_id} else None


def decode_after(before: Sequence[int], ids: Sequence[int], tokenizer: Any, hidden: Set[int] | None = None) -> str:
    """The text that `ids` add behind `before`: SentencePiece drops the space in front of the first word it decodes.

    before "What", ids "▁is ▁it"  ->  " is it"; without before "is it"
    """
    if not before:
        return decode(ids, tokenizer, hidden)
    beginning = decode(before, tokenizer, hidden).rstrip(REPLACEMENT)
    both = decode([*before, *ids], tokenizer, hidden)
    return both[len(beginning) :] if both.startswith(beginning) else decode(ids, tokenizer, hidden)


def without_cut_character(text: str) -> str:
    """The text without the bytes of a last character that is not whole yet: "猫\\ufffd\\ufffd" -> "猫"."""
    n_cut = len(text) - len(text.rstrip(REPLACEMENT))
    return text[: len(text) - min(n_cut, LONGEST_CUT_CHARACTER)]


def without_open_end(text: str, stop_texts: Sequence[str]) -> str:
    """The text without what more tokens may still change: a last character cut off, the beginning of a stop text.

    stops "\\nUser:":  "Yes.\\nUs" -> "Yes."      "Yes.\\n\\n" -> "Yes.\\n"      "好\\ufffd" -> "好"
    """
    text = text.rstrip(REPLACEMENT)
    n_open = 0
    for stop in stop_texts:
        lengths = range(min(len(stop) - 1, len(text)), n_open, -1)
        n_open = next((length for length in lengths if text.endswith(stop[:length])), n_open)
    return text[: len(text) - n_open]


def _repaired(ids: Sequence[int], values: Mapping[int, int]) -> list[int]:
    """The ids with every run of byte tokens made valid UTF-8: U+FFFD, in bytes, for what fits nowhere."""
    tokens = {value: token_id for token_id, value in values.items()}
    repaired: list[int] = []
    run = bytearray()
    for token_id in [*ids, None]:
        if token_id is not None and token_id in values:
            run.append(values[token_id])
            continue
        if run:
            repaired += [tokens[value] for value in run.decode("utf-8", "replace").encode("utf-8")]
            run.clear()
        if token_id is not None:
            repaired.append(token_id)
    return repaired


def _byte_values(tokenizer: Any) -> Mapping[int, int]:
    """Token id -> byte, for tokenizers with the byte tokens <0x00> to <0xFF> of SentencePiece; empty for others."""
    known = _byte_tokens.get(tokenizer)
    if known is None:
        names = [f"<0x{value:02X}>" for value in range(256)]
        ids = tokenizer.convert_tokens_to_ids(names)
        known = {token_id: value for value, token_id in enumerate(ids) if token_id is not None}
        if len(known) < 256 or tokenizer.decode([ids[value] for value in "你".encode()]).strip() != "你":
            known = {}
        _byte_tokens[tokenizer] = known
    return known
