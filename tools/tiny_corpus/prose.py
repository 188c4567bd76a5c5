"""Plain sentences about everyday things, so that the vocabulary is wider than the tasks. They ask nothing."""

from __future__ import annotations

import random

from .vocabulary import NAMES, NAMES_ZH, NOUNS

_ENGLISH = (
    "{name} has a {a} and a {b}.",
    "The {a} is near the {b}, and {name} is waiting for it.",
    "Yesterday {name} bought a {a} for the family and gave a {b} to a friend.",
    "An example describes a task, paired with some text that provides further context.",
    "A clear request is completed appropriately when the response is short and true.",
    "Please write the answer below the question, then read it again.",
    "An instruction tells you what to do, and an input gives you something to do it with.",
    "Every user may ask an assistant for help; the system decides what is polite.",
    "This is a chat between a curious user and a helpful assistant. The assistant gives detailed, polite answers.",
    "# Notes\n\n- the {a}\n- the {b}\n\nAll of this belongs to {name}.",
    "## {a} and {b}\n\nThey are different things, but {name} likes both of them.",
    "If you want a {a}, you should first look for a {b}; otherwise ask {name} about it.",
    "He said that she could use the {a} because they had another {b} at home.",
)
_CHINESE = (
    "{name}有一个{a},也有一个{b}。",
    "昨天{name}在商店里买了{a},回家以后又去找{b}。",
    "这里的{a}很多,可是没有人知道为什么。",
    "请先读问题,再写下回答,最后检查一遍。",
    "下面是一个任务的说明,请根据输入给出合适的回复。",
    "# 笔记\n\n- {a}\n- {b}\n\n这些都是{name}的。",
    "如果你想要{a},可以先问{name}有没有{b}。",
    "用户提出问题,助手给出详细而有礼貌的回答。",
    "今天天气很好,{name}和朋友一起去看{a}。",
)


def sentence(rng: random.Random) -> str:
    """One sentence or small note, in one of the two languages."""
    first, second = rng.sample(NOUNS, 2)
    if rng.random() < 0.6:
        return rng.choice(_ENGLISH).format(name=rng.choice(NAMES), a=first.english, b=second.english)
    return rng.choice(_CHINESE).format(name=rng.choice(NAMES_ZH), a=first.chinese, b=second.chinese)
