"""Errors and remarks of the other modules in the language of the page; they are written in English where they arise.

Knows their wordings, as gettext knows its messages; {} stands for what changes. It does not know who raises them.
"""

from __future__ import annotations

import re
from functools import cache

CHINESE = {
    # A conversation (session.py).
    "the message is empty; type something": "消息是空的；请输入内容。",
    "there is no question to answer; ask one first": "没有要回答的问题；请先提问。",
    "there is no answer to make anew; ask something first": "没有可以重新生成的回答；请先提问。",
    "there is nothing to undo": "没有可以撤销的内容。",
    "there is no message {}; this chat has {}": "没有第 {} 条消息；这段对话共有 {} 条。",
    "message {} has the role {}; {} must stand there: user and assistant take turns, and the user begins": (
        "第 {} 条消息的角色是 {}；这里应该是 {}：user 和 assistant 轮流发言，由 user 开始"
    ),
    "the newest message, with the system prompt, takes {} tokens, and {} are free for them beside the answer: "
    "shorten one of the two, or lower max_new_tokens": (
        "最新的消息加上系统提示有 {} 个词元，而除回答之外只剩 {} 个的位置：请缩短其中之一，或调低“最多生成词元数”"
    ),
    # The engine.
    "the prompt has {} tokens, and the model reads at most {}, answer included: shorten it": (
        "提示有 {} 个词元，而模型连同回答最多读 {} 个：请缩短"
    ),
    "there is no question: the last message must be the user's": "没有问题：最后一条消息必须来自用户",
    "the prompt is empty": "提示是空的",
    "the prompt holds token ids that the model does not have (0 to {})": "提示里有模型没有的词元编号（0 到 {}）",
    "the model is being shut down": "模型正在关闭",
    "the request was cancelled": "请求已取消",
    "this takes longer than --max_request_seconds allows; send less at once": (
        "这超过了 --max_request_seconds 允许的时间；请一次少发一些"
    ),
    "{}: no adapter is called {} (did you mean {}?); known: {}": "{}：没有名为 {} 的适配器（是不是 {}？）；已有：{}",
    "{}: no adapter is called {}; known: {}": "{}：没有名为 {} 的适配器；已有：{}",
    # A chat in a file (chat_file.py).
    "{}: {} is not known here and was left out (did you mean {}?)": "{}：这里不认识 {}，没有采用；是不是 {}？",
    "{}: {} is not known here and was left out": "{}：这里不认识 {}，没有采用",
    "the chat: {}": "对话文件：{}",
    "is larger than {} MB, the most that a chat may have": "大于 {} MB，超过了对话的上限",
    "is not UTF-8 text (byte {}); save it as UTF-8": "不是 UTF-8 文本（第 {} 字节）；请存为 UTF-8",
    "is not JSON (line {}, column {}: {})": "不是 JSON（第 {} 行第 {} 列）",
    "is nested too deep; a chat is a list of messages": "嵌套太深；对话是一个消息列表",
    "is not usable JSON ({})": "不是可用的 JSON",
    "holds {}; a chat is an object with messages, or a list of messages": (
        "内容是{}；对话应是带 messages 的对象，或消息列表"
    ),
    "is a chat of version {}, and this program reads version {}": "是版本 {} 的对话，而本程序读版本 {}",
    "holds no `messages`; it is no chat": "没有 `messages`；这不是对话",
    "the prompt type {} is not built in and is not taken from the chat": "提示模板 {} 不是内置的，没有采用",
    "`messages` is {}; a list of messages must stand there": "`messages` 是{}；这里应该是消息列表",
    "holds {} messages, and a chat may have {}": "有 {} 条消息，而一段对话最多 {} 条",
    "has two system prompts: `system` and the first message; remove one of them": (
        "有两个系统提示：`system` 和第一条消息；请去掉一个"
    ),
    "message {} is {}; an object with role and content must stand there": (
        "第 {} 条消息是{}；这里应该是带 role 和 content 的对象"
    ),
    "message {}: the role is {}; use user, assistant, or system for the first message": (
        "第 {} 条消息的角色是 {}；请用 user、assistant，或第一条用 system"
    ),
    "message {}: the role is system, which only the first message may have": (
        "第 {} 条消息的角色是 system，只有第一条可以"
    ),
    "message {} has no content": "第 {} 条消息没有 content",
    "message {}: the content has parts that are not text, such as images, which are not read here": (
        "第 {} 条消息的内容里有图片之类不是文本的部分，这里读不了"
    ),
    "message {}: `{}` is {}; a text must stand there": "第 {} 条消息：`{}` 是{}；这里应该是文本",
    "message {}: `{}` has {} characters; {} are allowed": "第 {} 条消息：`{}` 有 {} 个字符；最多 {} 个",
    "message {}: `{}` holds half a character (a lone surrogate); the file is damaged": (
        "第 {} 条消息：`{}` 里有半个字符；文件已损坏"
    ),
    "`{}` is {}; a text must stand there": "`{}` 是{}；这里应该是文本",
    "`{}` has {} characters; {} are allowed": "`{}` 有 {} 个字符；最多 {} 个",
    "`{}` holds half a character (a lone surrogate); the file is damaged": "`{}` 里有半个字符；文件已损坏",
    "`sampling` is {}; an object must stand there": "`sampling` 是{}；这里应该是对象",
    "sampling: {} is {}; a list of texts must stand there": "sampling：{} 是{}；这里应该是文本列表",
    "sampling: {} is larger than any number that makes sense there": "sampling：{} 大得没有意义",
    "sampling: {} is {}; {} must stand there": "sampling：{} 是 {}；这里应该是{}",
    "sampling: {}": "sampling：{}",
    "max_new_tokens: {} leaves no room for an answer; use 1 or more": (
        "max_new_tokens 是 {}，没有给回答留位置；请用 1 或更大"
    ),
    "min_new_tokens: {} is not between 0 and --max_new_tokens": "min_new_tokens 是 {}，不在 0 和 max_new_tokens 之间",
    "temperature: {} is not between 0 (greedy) and 100; 0.7 is usual": (
        "temperature 是 {}，不在 0（总取最可能的）和 100 之间；常用 0.7"
    ),
    "top_p: {} is not a probability above 0": "top_p 是 {}，不是大于 0 的概率",
    "num_beams: {}: use 1 (no beam search) or more": "num_beams 是 {}；请用 1（不用束搜索）或更大",
    "repetition_penalty: {}: use 1 (off) or a little more": "repetition_penalty 是 {}；请用 1（关闭）或略大的值",
    "{}: {} is negative; 0 turns it off": "{} 是负数 {}；0 表示关闭",
    "{}: is empty; an empty text would end every answer before it begins": ("{} 里有空文本；它会让回答还没开始就结束"),
    "a message": "消息",
    "the chat": "对话",
    "an object": "对象",
    "a list": "列表",
    "a text": "文本",
    "true or false": "真假值",
    "null": "空值",
    "a number": "数字",
    "a whole number": "整数",
    # The operating system.
    "No such file or directory": "没有这个文件或文件夹",
    "Permission denied": "没有权限",
    "No space left on device": "磁盘已满",
    "Read-only file system": "文件系统是只读的",
    "Is a directory": "那是一个文件夹",
}


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(re.escape(text).replace(r"\{\}", "(.+?)"), re.DOTALL), to) for text, to in CHINESE.items()]


def in_language(language: str, text: str) -> str:
    """`text` in this language where its wording is known; else as it is."""
    if language != "zh":
        return text
    for pattern, chinese in _patterns():
        match = pattern.fullmatch(text)
        if match:
            return chinese.format(*(in_language(language, group) for group in match.groups()))
    return text
