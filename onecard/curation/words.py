"""The words of a text as duplicates and overlaps are counted: words, single Chinese characters, signs that mean.

Knows texts. Does not know records or files.
"""

from __future__ import annotations

import re

from onecard.data.messages import Conversation, Document

# Chinese and Japanese are not written with blanks, so a character is a word; "2+2" and "2-2" are different texts,
# "Hello!" and "hello" are not.
_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    "|[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
    "|[-+*/=<>^%$#@&|~_\\\\]"
)


def words_of(text: str) -> list[str]:
    """The words in order: "Add 2+2。你好" -> ["add", "2", "+", "2", "你", "好"]."""
    return _WORD.findall(text.lower())


def runs_of(words: list[str], length: int) -> list[str]:
    """Every run of `length` words in a row, joined with blanks; all words as one run where there are fewer."""
    if len(words) <= length:
        return [" ".join(words)]
    return [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]


def texts_of(sample: Conversation | Document) -> list[tuple[str, str]]:
    """(role, text) of each turn, the input of a question with it; of a document the one text, with an empty role."""
    if isinstance(sample, Document):
        return [("", sample.text)]
    return [
        (turn.role, "\n".join([turn.content, *([turn.input] if turn.input else []), *map(str, turn.tool_calls)]))
        for turn in sample.turns
        if turn.role != "tool_list"  # the same one for many conversations
    ]
