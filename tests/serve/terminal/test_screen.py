"""Nothing that comes out of a model or a file is obeyed, and what is drawn fits the screen."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from onecard.errors import DataError
from onecard.inference.call import Chunk
from onecard.serve.terminal.screen import Screen, last_lines, printable
from onecard.translation import use_language


def test_every_control_character_is_made_printable() -> None:
    seen = 0
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp"):
            seen += 1
            for character in printable(chr(code)):
                assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
    assert seen == 65 + 2048 + 2


@given(st.text())
def test_letters_stay_and_the_beginning_of_a_text_becomes_the_beginning(text: str) -> None:
    for end in range(len(text)):
        assert printable(text).startswith(printable(text[:end]))
    if text.isprintable():
        assert printable(text) == text


@given(st.text(st.sampled_from("ab 你好🙂é\n\t"), max_size=80), st.integers(2, 12), st.integers(0, 6))
def test_the_last_lines_fit_and_are_the_end_of_the_text(text: str, width: int, n_lines: int) -> None:
    lines = last_lines(text, width, n_lines)
    assert len(lines) <= n_lines
    assert all(cell_len(line) <= width for line in lines)
    assert text.replace("\t", "    ").replace("\n", "").endswith("".join(lines))
    if n_lines and text:
        assert lines, "something is shown"


def test_the_last_lines_are_as_many_as_there_is_room_for() -> None:
    assert last_lines("你好世界", 5, 3) == ["你好", "世界"]
    assert last_lines("你好世界", 4, 1) == ["世界"]
    assert last_lines("a\n\nb\n", 4, 9) == ["a", "", "b", ""]
    assert last_lines("a\n\nb\n", 4, 2) == ["b", ""]


@pytest.mark.parametrize("rewrites", [False, True])
def test_a_program_gets_the_last_text_whole_even_after_an_error(capsys, rewrites: bool) -> None:
    screen = Screen(quiet=True)
    with pytest.raises(DataError), screen.typing(rewrites=rewrites) as show:
        show(Chunk("One"))
        show(Chunk("One two \x1b[1m\n"))
        assert capsys.readouterr().out == ""
        raise DataError("broken")
    assert capsys.readouterr().out == "One two ␛[1m\n\n"


def test_an_empty_answer_prints_nothing(capsys) -> None:
    with Screen(quiet=True).typing(rewrites=False) as show:
        show(Chunk(""))
    assert capsys.readouterr().out == ""


def test_everything_else_is_printable_too(capsys) -> None:
    screen = Screen()
    screen.say("a\x1b[2J")
    screen.warn("b\x1b[2J")
    screen.remark("c\x1b[2J")
    screen.error(DataError("d\x1b[2J\n  e"))
    screen.note("nobody sees this in a pipe")
    captured = capsys.readouterr()
    assert captured.out == "a␛[2J\n"
    assert captured.err == "warning: b␛[2J\nwarning: c␛[2J\nerror: d␛[2J; e\n"


def test_a_note_on_a_terminal_is_in_the_language_of_the_messages(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    use_language("zh")
    try:
        Screen().note("(nothing was said yet)")
    finally:
        use_language("auto")
    assert "（还没有说过什么）" in capsys.readouterr().out
