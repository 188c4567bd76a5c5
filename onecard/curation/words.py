"""The words of a text as duplicates and overlaps are counted: words, single Chinese characters, signs that mean.

Knows texts. Does not know records or files.
"""

from __future__ import annotations

import re

from onecard.data.messages import Conversation, Document, Turn

# Chinese and Japanese are not written with blanks, so a character is a word; "2+2" and "2-2" are different texts,
# "Hello!" and "hello" are not.
_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    "|[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
    "|[-+*/=<>^%$#@&|~_\\\\]"
)

_FRAME = ("system", "tool_list")


def words_of(text: str) -> list[str]:
    """The words in order: "Add 2+2。你好" -> ["add", "2", "+", "2", "你", "好"]."""
    return _WORD.findall(text.lower())


def runs_of(words: list[str], length: int) -> list[str]:
    """Every run of `length` words in a row, joined with blanks; all words as one run where there are fewer."""
    if len(words) <= length:
        return [" ".join(words)]
    return [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]


def texts_of(sample: Conversation | Document, *, with_frame: bool = True) -> list[tuple[str, str]]:
    """(role, text) of each turn with its thought, input and calls; of a document the one text, with an empty role.

    The worse answer of a preference pair comes last. with_frame: system texts and lists of tools, too, which many
    records share.
    """
    if isinstance(sample, Document):
        return [("", sample.text)]
    turns = (*sample.turns, *sample.rejected)
    return [(turn.role, _text_of(turn)) for turn in turns if with_frame or turn.role not in _FRAME]


def _text_of(turn: Turn) -> str:
    calls = (f"{call.name} {call.arguments}" for call in turn.tool_calls)
    return "\n".join(filter(None, (turn.thought, turn.content, turn.input, *calls)))
