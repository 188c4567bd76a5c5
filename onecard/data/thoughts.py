"""Thoughts in front of an answer, as templates of reasoning models write them: <think> ... </think>.

A template may open a thought at the end of the generation prompt (DeepSeek-R1), so that the model only completes it;
put an empty one before an answer that has none (Qwen3); and drop the thoughts of earlier answers (both).

Knows marks and texts. Does not know templates, turns or tokens.
"""

from __future__ import annotations

import re

# <think>, <thinking>, [THINK], ◁think▷, <seed:think>, <|START_THINKING|>, <|begin_of_thought|>; no closing mark
_NAME = r"\|?(?!end)(?:[a-z]+[_:])*(?:think|thinking|thought|reason|reasoning)\|?"
_OPENING = rf"(?:<{_NAME}>|\[{_NAME}\]|◁{_NAME}▷)"
_OPENED = re.compile(rf"{_OPENING}\s*\Z", re.IGNORECASE)
_BEGINNING = re.compile(rf"\s*({_OPENING})\s*", re.IGNORECASE)
_PAIRS = (("START", "END"), ("start", "end"), ("begin", "end"))


def opened_thought(prompt: str) -> str:
    """The thought that a generation prompt opens at its end, blanks included, or "".

    "<｜Assistant｜><think>\\n" -> "<think>\\n"        "<|im_start|>assistant\\n" -> ""
    """
    found = _OPENED.search(prompt)
    return found.group() if found is not None else ""


def empty_thought(text: str) -> str:
    """The empty thought with which `text` begins, line breaks behind it included, or "".

    "<think>\\n\\n</think>\\n\\nHello" -> "<think>\\n\\n</think>\\n\\n"
    """
    found = _BEGINNING.match(text)
    if found is None or not text.startswith(closing_mark(found[1]), found.end()):
        return ""
    after = text[found.end() + len(closing_mark(found[1])) :]
    return text[: len(text) - len(after.lstrip("\r\n"))]


def has_thought(content: str) -> bool:
    """Whether an answer brings its own thought, even an empty one."""
    return _BEGINNING.match(content) is not None


def split_thought(content: str, opened: str = "") -> tuple[str, str]:
    """A whole thought in front of an answer, and the answer; ("", content) where there is none.

    "<think>\nHm.\n</think>\n\nYes" -> "Hm.", "Yes"
    opened "<think>\n": "Hm.</think>Yes", as a model whose prompt opens the thought writes it -> "Hm.", "Yes"
    """
    found = _BEGINNING.match(content)
    opening, start = (found[1], found.end()) if found is not None else (opened.strip(), 0)
    if not opening:
        return "", content
    thought, closed, answer = content[start:].partition(closing_mark(opening))
    return (thought.strip(), answer.lstrip()) if closed else ("", content)


def thought_mark(jinja: str) -> str:
    """The mark with which answers of this template begin a thought, "" where it names none."""
    found = re.search(_OPENING, jinja, re.IGNORECASE)
    return found.group() if found is not None else "<think>" if "</think>" in jinja else ""


def read_thought(text: str, mark: str, opened: str = "", *, ended: bool) -> tuple[str, str]:
    """The thought in an answer that may still grow, and the rest; both only grow with it.

    "<think>\nHm" -> "Hm", ""      "<think>\nHm.\n</think>\n\nYes" -> "Hm.", "Yes"      "<thi", not ended -> "", ""
    opened: what of a thought the prompt has opened; then the answer begins inside it.
    """
    mark = opened.strip() or mark
    own = text.lstrip()
    if not own.startswith(mark) and not ended and mark.startswith(own):
        return "", ""
    if not own.startswith(mark) and not opened:
        return "", text
    closing = closing_mark(mark)
    thought, closed, answer = own.removeprefix(mark).partition(closing)
    if closed:
        return thought.strip(), answer.lstrip()
    n_open = next((n for n in range(len(closing) - 1, 0, -1) if thought.endswith(closing[:n])), 0)
    return (thought if ended else thought[: len(thought) - n_open]).strip(), ""


def completion(opened: str, content: str) -> str:
    """What follows a generation prompt that ends with `opened`, for an answer with or without a thought of its own.

    opened "<think>\\n":  "<think>\\nHm.\\n</think>\\n\\nYes" -> "Hm.\\n</think>\\n\\nYes"
                         "Hm.\\n</think>\\n\\nYes" (as such models write it) -> the same
                         "Yes" -> "\\n</think>\\n\\nYes"

    The last one closes an empty thought, which is not learned (chat_template.py): it would teach not to think.
    """
    mark = opened.strip()
    own = content.lstrip()
    if own.startswith(mark):
        return own[len(mark) :].removeprefix(opened[len(mark) :])
    if closing_mark(mark) in content:
        return content
    return "\n" * max(0, 2 - opened.count("\n")) + f"{closing_mark(mark)}\n\n{content}"


def with_thought(thought: str, answer: str) -> str:
    """The answer behind its thought, as reasoning models write it; as it is where it brings a thought of its own."""
    if not thought or has_thought(answer):
        return answer
    return f"<think>\n{thought}\n</think>" + (f"\n\n{answer}" if answer else "")


def closing_mark(opening: str) -> str:
    """<think> -> </think>, [THINK] -> [/THINK], <|START_THINKING|> -> <|END_THINKING|>."""
    for first, last in _PAIRS:
        if first in opening:
            return opening.replace(first, last, 1)
    return f"{opening[0]}/{opening[1:]}"
