"""How a question and its answer may stand on a page: many layouts, none of them a prompt template.

A base model has met questions on every kind of page; one that has met a single kind finds the question on no other.
"""

from __future__ import annotations

import random

_OPENINGS = (
    "Here is a task from a school book.",
    "The page describes an exercise, and the answer that completes it.",
    "Read what is asked, then write what fits.",
    "A user sends a request; the assistant answers it appropriately.",
    "This note has a question, paired with some text that gives the context.",
    "The answer that follows is short.",
    "Further down stands the result.",
    "Below stands a question that a reader may ask.",
    "Write a line that suits the request.",
    "Here follows an instruction that describes what is wanted, with an input.",
    "A good response completes the task and provides nothing further.",
    "下面是一道题目和它的答案。",
    "请先看题目,再写答案。",
    "这里有一个任务。",
)
_STYLES = ("### {label}:\n{text}", "## {label}\n{text}", "{label}: {text}", "{label}:\n{text}")
_ASK = ("Question", "Exercise", "Problem", "Task", "Request", "题目", "问题")
_GIVEN = ("Text", "Given", "Data", "Source", "Context", "原文", "材料")
_ANSWER = ("Answer", "Reply", "Solution", "Result", "Output", "答案", "回答")


def page(rng: random.Random, question: str, given: str) -> str:
    """A page up to its answer: sometimes an opening, the question, what it is about (may be empty), the last head."""
    style, gap = rng.choice(_STYLES), rng.choice(("\n", "\n\n"))
    opening = " ".join(rng.sample(_OPENINGS, rng.choice((0, 1, 1, 2))))
    parts = [(rng.choice(_ASK), question), (rng.choice(_GIVEN), given)]
    blocks = [style.format(label=label, text=text) for label, text in parts if text]
    blocks.append(style.format(label=rng.choice(_ANSWER), text=""))
    return gap.join([opening, *blocks] if opening else blocks).rstrip(" ")
