"""The loop at the keyboard: each line an answer of its own, typed live, and a clean way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from onecard.errors import DataError
from onecard.inference.call import Chunk, Usage
from onecard.serve.terminal.ask import answer_once, interact


def keyboard(*lines: str | type[BaseException]) -> Callable[[str], str]:
    waiting = iter(lines)

    def read_line(prompt: str) -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    return read_line


def echo(instruction: str, number: int) -> Iterator[Chunk]:
    text = f"{number}: {instruction}"
    yield Chunk(text[:3])
    yield Chunk(text, finish_reason="stop", usage=Usage(5, 3))


@pytest.mark.parametrize("way_out", ["", "  ", EOFError, KeyboardInterrupt])
def test_empty_line_ctrl_d_and_ctrl_c_leave(way_out, capsys) -> None:
    assert interact(echo, read_line=keyboard("first", " second ", way_out)) == 2
    said = capsys.readouterr().out
    assert "0: first\n" in said
    assert "1:  second \n" in said, "the line reaches the model as it was typed"
    assert said.count("[3 tokens, ") == 2


def test_ctrl_c_during_an_answer_stops_that_one_and_frees_the_model(capsys) -> None:
    closed = []

    def interrupted(instruction: str, number: int) -> Iterator[Chunk]:
        try:
            yield Chunk("so far")
            raise KeyboardInterrupt
        finally:
            closed.append(number)

    assert interact(interrupted, read_line=keyboard("first", "second", "")) == 2
    said = capsys.readouterr().out
    assert said.count("so far\n[stopped]") == 2
    assert closed == [0, 1]


def test_a_question_that_cannot_be_asked_does_not_end_the_loop(capsys) -> None:
    def picky(instruction: str, number: int) -> Iterator[Chunk]:
        if "long" in instruction:
            raise DataError("the prompt has 900 tokens")
        yield from echo(instruction, number)

    assert interact(picky, read_line=keyboard("long", "short", "")) == 2
    captured = capsys.readouterr()
    assert "900 tokens" in captured.err
    assert "1: short" in captured.out


def test_one_answer_stands_alone_on_standard_output(capsys) -> None:
    def cut(instruction: str, number: int) -> Iterator[Chunk]:
        yield Chunk("  H", usage=Usage(5, 1))
        yield Chunk(f"  {instruction}\n", finish_reason="length", usage=Usage(5, 3))

    answer_once(cut, "Hi")
    captured = capsys.readouterr()
    assert captured.out == "  Hi\n\n"
    assert "after 3 tokens; --max_new_tokens" in captured.err
    assert re.search(r"^\[3 tokens, [\d.]+ tokens/s\]$", captured.err, re.MULTILINE)
