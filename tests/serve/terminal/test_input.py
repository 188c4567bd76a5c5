"""Messages of one line and of several, from a keyboard and from a script."""

from __future__ import annotations

import pytest

from onecard.serve.terminal.commands import split_command
from onecard.serve.terminal.input import PipedInput, read_message, readable


@pytest.mark.parametrize(
    ("typed", "message", "left"),
    [
        (["one", "two"], "one", 1),
        (["one\\", "two\\", "three", "four"], "one\ntwo\nthree", 1),
        (["one\\"], "one", 0),
        (['"""one', "", ' two"""', "three"], "one\n\n two", 1),
        (['"""', "one\\", "two", '"""', "three"], "one\\\ntwo", 1),
        (['"""one"""', "two"], "one", 1),
        (['""""""', "two"], "", 1),
        (['"""', "never", "closed"], "never\nclosed", 0),
        (['/system """', "one", "two", '"""', "three"], "/system one\ntwo", 1),
        (['/edit 3 """one', 'two"""  ', "three"], "/edit 3 one\ntwo", 1),
        (['what is """ for?', "two"], 'what is """ for?', 1),
        (['/system what is """ for?', "two"], '/system what is """ for?', 1),
        (["", "two"], "", 1),
        (["a paste\nof two lines\n", "three"], "a paste\nof two lines", 1),
    ],
)
def test_messages(typed: list[str], message: str, left: int) -> None:
    waiting = iter(typed)

    def read_line(prompt: str) -> str:
        for line in waiting:
            return line
        raise EOFError

    assert read_message(read_line) == message
    assert len(list(waiting)) == left


def test_the_end_of_the_input_is_told() -> None:
    script = PipedInput("one\n\ntwo")
    assert [read_message(script) for _ in range(3)] == ["one", "", "two"]
    with pytest.raises(EOFError):
        read_message(script)


def test_prompts_tell_whether_a_message_goes_on() -> None:
    prompts = []
    lines = iter(["one\\", "two"])

    def read_line(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    read_message(read_line)
    assert prompts == ["> ", ". "]


def test_half_characters_become_whole_ones() -> None:
    assert readable("你好 caf\udce9") == "你好 caf\ufffd\ufffd\ufffd"
    readable("\ud83d").encode("utf-8")


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ("/r", ("regenerate", "")),
        ("/?", ("help", "")),
        ("/EDIT 3  Why?\nReally", ("edit", "3  Why?\nReally")),
        ("/save! a b.json", ("save!", "a b.json")),
        ("/nonsense x", ("nonsense", "x")),
        (" /r", None),
        ("/usr/bin is full", None),
        ("/* comment */", None),
        ("//", None),
        ("/", None),
        ("r", None),
        ("", None),
    ],
)
def test_commands_are_told_from_messages(message: str, command: tuple[str, str] | None) -> None:
    assert split_command(message) == command
