"""The loop at the keyboard: each line an answer of its own, and a clean way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from onecard.console import DataError
from onecard.talk.generation import Generation
from onecard.talk.terminal import answer_once, interact


def keyboard(*lines: str | type[BaseException]) -> Callable[[str], str]:
    waiting = iter(lines)

    def read_line(prompt: str) -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    return read_line


def echo(instruction: str, number: int) -> Generation:
    return Generation(f"{number}: {instruction}", "stop", 5, 3)


@pytest.mark.parametrize("way_out", ["", "  ", EOFError, KeyboardInterrupt])
def test_empty_line_ctrl_d_and_ctrl_c_leave(way_out, capsys) -> None:
    assert interact(echo, keyboard("first", " second ", way_out)) == 2
    said = capsys.readouterr().out
    assert "0: first\n" in said
    assert "1:  second \n" in said, "the line reaches the model as it was typed"
    assert said.count("tokens/s") == 2


def test_ctrl_c_during_an_answer_leaves_too() -> None:
    def interrupted(instruction: str, number: int) -> Generation:
        raise KeyboardInterrupt

    assert interact(interrupted, keyboard("first")) == 0


def test_a_question_that_cannot_be_asked_does_not_end_the_loop(capsys) -> None:
    def picky(instruction: str, number: int) -> Generation:
        if "long" in instruction:
            raise DataError("the prompt has 900 tokens")
        return echo(instruction, number)

    assert interact(picky, keyboard("long", "short", "")) == 2
    captured = capsys.readouterr()
    assert "900 tokens" in captured.err
    assert "1: short" in captured.out


def test_one_answer_stands_alone_on_standard_output(capsys) -> None:
    answer_once(lambda instruction, number: Generation(f"  {instruction}\n", "length", 5, 3), "Hi")
    captured = capsys.readouterr()
    assert captured.out == "  Hi\n\n"
    assert "--max_new_tokens" in captured.err
